#!/usr/bin/env bash
# Installs pins.txt into the active virtual environment, which must see the base image's packages:
#   install.sh PINS
# A base image with PyTorch keeps it, along with its CUDA libraries; their part of the pins is skipped then.
set -euo pipefail
pins=$1
wanted=$(mktemp)
trap 'rm -f "$wanted"' EXIT

last_part='# Only if the base has no PyTorch.'
grep --quiet --line-regexp --fixed-strings "$last_part" "$pins" || {
    echo "$pins: has no line '$last_part', without which PyTorch of the base would be replaced. Restore it." >&2
    exit 1
}
if python -c 'import importlib.util, sys; sys.exit(importlib.util.find_spec("torch") is None)'; then
    echo "PyTorch comes from the base image"
    sed "/^$last_part\$/,\$d" "$pins" >"$wanted"
else
    echo "PyTorch comes from $pins, since the base image has none"
    cp "$pins" "$wanted"
fi
# NGC images constrain pip to their own versions; the pins are exact and must win in this environment.
PIP_CONSTRAINT='' python -m pip install --no-deps --requirement "$wanted"

# The base's torchrun would start the base's Python, which does not have this environment's packages.
torchrun=$VIRTUAL_ENV/bin/torchrun
if [ ! -e "$torchrun" ]; then
    printf '#!/bin/sh\nexec "%s/bin/python" -m torch.distributed.run "$@"\n' "$VIRTUAL_ENV" >"$torchrun"
    chmod +x "$torchrun"
fi
