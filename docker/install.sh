#!/usr/bin/env bash
# Installs the pins by their hashes into the active virtual environment, which must see the base image's packages:
#   install.sh LOCK cpu|gpu
# A base image with PyTorch keeps it, along with its CUDA libraries; their part of the pins is skipped then. Where
# PyTorch comes from the pins, `cpu` leaves out NVIDIA's libraries and puts stand-ins into /usr/local/lib/no-cuda.
set -euo pipefail
lock=$1 device=$2
here=$(dirname "${BASH_SOURCE[0]}")
stubs=${STUBS:-/usr/local/lib/no-cuda}
work=$(mktemp --directory)
trap 'rm -rf "$work"' EXIT

torch_part='# Only if the base has no PyTorch.'
gpu_part='# Only if that PyTorch is for GPUs.'
for part in "$torch_part" "$gpu_part"; do
    grep --quiet --line-regexp --fixed-strings "$part" "$lock" || {
        echo "$lock: has no line '$part', without which PyTorch of the base would be replaced. Restore it." >&2
        exit 1
    }
done
if python -c 'import importlib.util, sys; sys.exit(importlib.util.find_spec("torch") is None)'; then
    echo "PyTorch comes from the base image"
    last_part=$torch_part device=base
elif [ "$device" = cpu ]; then
    echo "PyTorch comes from $lock, without CUDA, since the base image has none"
    last_part=$gpu_part
else
    echo "PyTorch comes from $lock, with CUDA, since the base image has none"
    last_part=''
fi
if [ "$last_part" ]; then
    sed "/^$last_part\$/,\$d" "$lock" >"$work/wanted"
else
    cp "$lock" "$work/wanted"
fi

# A certificate that only the building machine needs is not part of the image.
if [ -s /run/secrets/ca-bundle ]; then
    export PIP_CERT=/run/secrets/ca-bundle SSL_CERT_FILE=/run/secrets/ca-bundle
fi
# Wheels first: what has to be built is built with the pinned setuptools and PyTorch, not with whatever is newest.
# NGC images constrain pip to their own versions; the pins are exact and must win in this environment.
export PIP_CONSTRAINT=''
# With this set, compiled modules are recognized by a hash of their source, whatever time a builder gives to files: on
# a read-only root file system a stale one would be compiled again at every start.
export SOURCE_DATE_EPOCH=315532800
install=(python -m pip install --no-deps --require-hashes)
grep --invert-match '\.tar\.gz$' "$work/wanted" >"$work/wheels"
"${install[@]}" --only-binary :all: --requirement "$work/wheels"
if [ "$device" = cpu ]; then
    torch=$(python -c 'import importlib.util; print(*importlib.util.find_spec("torch").submodule_search_locations)')
    python "$here/cuda_stubs.py" "$torch/lib" "$stubs"
    export LD_LIBRARY_PATH=$stubs
fi
if grep '\.tar\.gz$' "$work/wanted" >"$work/sources"; then
    "${install[@]}" --no-build-isolation --no-binary :all: --requirement "$work/sources"
fi

# The base's torchrun would start the base's Python, which does not have this environment's packages.
torchrun=$VIRTUAL_ENV/bin/torchrun
if [ ! -e "$torchrun" ]; then
    printf '#!/bin/sh\nexec "%s/bin/python" -m torch.distributed.run "$@"\n' "$VIRTUAL_ENV" >"$torchrun"
    chmod +x "$torchrun"
fi
