#!/usr/bin/env bash
# Self-test of the image; needs no network:
#   smoke.sh            packages, a few training steps on two CPU ranks (and on a GPU if there is one), preflight
#   smoke.sh packages   only packages and revision; last step of the build
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

check_packages() {
    python - docker/pins.txt <<'PYTHON'
"""Check that every package comes from where it should, in the version of pins.txt."""
import importlib
import importlib.metadata
import re
import sys
from pathlib import Path

pins = dict(line.split("==") for line in Path(sys.argv[1]).read_text().split() if "==" in line)
torch = importlib.import_module("torch")
from_base = not Path(torch.__file__).is_relative_to(sys.prefix)
# A base's PyTorch is a separate build between two releases, such as 2.13.0a0+1234; only the release counts.
release = torch.__version__.partition("+")[0].partition("a")[0]
faults = [] if release == pins["torch"] else [f"torch {torch.__version__}: pins.txt has {pins['torch']}"]
cuda = ("triton", "cuda", "nvidia")
if from_base:
    pins = {name: pin for name, pin in pins.items() if name != "torch" and not name.startswith(cuda)}
elif Path("/usr/local/lib/no-cuda/libcudart.so.13").exists():
    # Stand-ins for NVIDIA's libraries: none of the real ones may be there, nor a GPU be seen.
    pins = {name: pin for name, pin in pins.items() if not name.startswith(cuda)}
    found = {each.metadata["Name"] for each in importlib.metadata.distributions()}
    faults += [f"{name} is in an image for CPUs" for name in sorted(found) if name.startswith(cuda)]
    faults += ["an image for CPUs sees a GPU"] if torch.cuda.is_available() else []
for name, pin in pins.items():
    if name != "torch" and (found := importlib.metadata.version(name)) != pin:
        faults.append(f"{name} {found}: pins.txt has {pin}")
modules = ["megatron.core", "emerging_optimizers", "av", "k25_train.train", "launch.preflight.job"]
if from_base:
    # Loading kernels may need a driver, which a machine that builds images does not have.
    modules += ["transformer_engine.pytorch", "apex"] if torch.cuda.is_available() else []
    for name in ("transformer-engine", "apex"):
        print(f"{name} {importlib.metadata.version(name)} from the base")
# As programs do: what megatron-core needs on a CPU is in place before it is imported.
use_platform = importlib.import_module("parallel.megatron.platform").use_platform
use_platform("cuda" if torch.cuda.is_available() else "cpu")
for module in modules:
    importlib.import_module(module)
if faults:
    sys.exit("\n".join([*faults, "choose another BASE, or change docker/pins.txt and setup.py together"]))
revision = importlib.import_module("k25_train.revision").code_version(Path.cwd())
if not re.match(r"[0-9a-f]{40}\b", revision):
    sys.exit(f"the image does not know its revision: {revision}")
print(f"revision {revision}")
print(f"packages: torch {torch.__version__} from the {'base' if from_base else 'pins'}, {len(pins)} pins satisfied")
PYTHON
}

# A container without a network cannot resolve its own name, so everything is kept on loopback.
two_ranks() {
    GLOO_SOCKET_IFNAME=lo torchrun --nproc-per-node 2 --local-addr 127.0.0.1 \
        --rdzv-backend c10d --rdzv-endpoint 127.0.0.1:0 -m "$@" parallelism.ep=1 cluster.gpus_per_node=2
}

check_training() {
    local runs=$1
    # Eight sequences per step, as in the smoke job; two steps cover forward, backward, exchange, update and saving.
    two_ranks k25_train.train experiment=smoke run.dir="$runs/cpu" train.steps=2 train.eval_sequences=8 \
        optim.warmup=1 optim.decay=1 checkpoint.interval=2
    if python -c 'import sys, torch; sys.exit(not torch.cuda.is_available())'; then
        python -m k25_train.train experiment=smoke_1gpu run.dir="$runs/gpu" \
            train.steps=2 optim.warmup=1 optim.decay=1
    else
        echo "training on a GPU: skipped: no GPU is visible"
    fi
}

check_preflight() {
    two_ranks launch.preflight experiment=smoke run.dir="$1/preflight"
}

check_packages
[ "${1:-all}" = packages ] && exit
export OMP_NUM_THREADS=1
runs=$(mktemp --directory)
trap 'rm -rf "$runs"' EXIT
check_training "$runs"
check_preflight "$runs"
echo "self-test passed"
