#!/usr/bin/env bash
# `cluster.slurm.python` of a site with Apptainer: ranks run in the image $K25_SIF, and what speaks to SLURM runs on the
# node itself, whose Python (K25_HOST_PYTHON, or python3 of 3.12 or newer) needs no packages. In the cluster's file:
#
#   slurm:
#     python: /shared/k25-train/docker/apptainer_python.sh
#   environment:
#     K25_SIF: {value: /shared/images/k25-train.sif, reason: image of the ranks}
#     APPTAINER_BINDPATH: {value: '/scratch,/data', reason: folders of runs and data}
set -euo pipefail
if [[ $* == "-m launch.supervisor"* || $* == "-m launch.rendezvous"* ]]; then
    exec "${K25_HOST_PYTHON:-python3}" "$@"
fi
if [ -z "${K25_SIF:-}" ]; then
    echo "K25_SIF: must be the Apptainer image of the ranks; set it in \`environment\` of the cluster's file" >&2
    exit 2
fi
options=(--pwd "$PWD")
if [ -e "${NVIDIA_DEVICE:-/dev/nvidiactl}" ]; then
    options+=(--nv)
fi
# The entry point sets folders for caches, and becomes Python.
exec apptainer exec "${options[@]}" "$K25_SIF" /opt/k25-train/docker/entrypoint.sh python "$@"
