#!/usr/bin/env bash
# Entry point of the image: one of the project's commands, or any other:
#   docker run IMAGE plan experiment=smoke
#   docker run IMAGE bash
# It becomes the command, so that signals reach it. It also works as any user and on a read-only root file system:
# what libraries cache goes to a folder that this user alone can write to.
set -euo pipefail
code=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)

usage() {
    cat <<'TEXT'
usage: docker run IMAGE COMMAND [ARGUMENTS]

  train        train on this node: python -m launch.torchrun; several nodes with --node and --first-node
  rank         one rank of training, started by another launcher: python -m k25_train.train
  eval         held-out loss of a checkpoint
  plan         FLOPs, memory and time of a configuration, by calculation
  dryrun       build every rank of a configuration without memory
  checkpoint   inspect, verify, compare and prune checkpoints
  convert      import and export weights as Hugging Face folders
  data         build, inspect and verify data sets
  preflight    check this node
  status       what a run does
  submit       submit to SLURM; in an image mostly with --dry-run
  kubernetes   the same for Kubernetes
  revision     which code this image has
  self-test    packages, two training steps on two ranks, preflight
  sbom         the software bill of materials, SPDX 2.3 as JSON

Anything else is run as it is (bash, python, …). COMMAND --help tells more.
TEXT
}

# A user without an entry in /etc/passwd has no name and / as home.
name=$(id --user --name 2>/dev/null || echo "uid$(id --user)")
export USER=${USER:-$name} LOGNAME=${LOGNAME:-$name}
if [ ! -w "${HOME:-/}" ] || [ "${HOME:-/}" = / ]; then
    HOME=$(mktemp --directory "${TMPDIR:-/tmp}/home.XXXXXX") || {
        echo "a command needs a folder to write to: docker run --tmpfs /tmp, or set HOME or TMPDIR to one" >&2
        exit 2
    }
    export HOME
fi
export XDG_CACHE_HOME=${XDG_CACHE_HOME:-$HOME/.cache}
export TORCH_EXTENSIONS_DIR=${TORCH_EXTENSIONS_DIR:-$XDG_CACHE_HOME/torch_extensions}
export TORCHINDUCTOR_CACHE_DIR=${TORCHINDUCTOR_CACHE_DIR:-$XDG_CACHE_HOME/torchinductor}
export TRITON_HOME=${TRITON_HOME:-$HOME}
export HF_HOME=${HF_HOME:-$XDG_CACHE_HOME/huggingface}
export MPLCONFIGDIR=${MPLCONFIGDIR:-$XDG_CACHE_HOME/matplotlib}

command=${1:-help}
[ "$#" -eq 0 ] || shift
case $command in
    train) exec python -m launch.torchrun "$@" ;;
    rank) exec python -m k25_train.train "$@" ;;
    eval | plan | dryrun | checkpoint | convert | data) exec python -m "k25_train.$command" "$@" ;;
    preflight | kubernetes | status | revision) exec python -m "launch.$command" "$@" ;;
    submit) exec python -m launch.slurm "$@" ;;
    self-test) exec "$code/docker/smoke.sh" "$@" ;;
    sbom) exec cat /usr/share/k25-train/sbom.spdx.json ;;
    help | --help | -h) usage ;;
    -*)
        echo "$command: a command comes first; see \`docker run IMAGE help\`" >&2
        exit 2
        ;;
    *) exec "$command" "$@" ;;
esac
