#!/usr/bin/env bash
# Builds the CPU image from Debian's packages alone, without a container runtime, and runs its self-test in a
# network namespace with nothing but loopback:
#   docker/build_cpu.sh [FOLDER]     where the base is built (build/docker)
# Needs root and: apt-get install buildah debootstrap iproute2. Takes 20 GB of disk.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
folder=${1:-build/docker}
suite=trixie  # Debian's first release with Python 3.12 or newer
image=k25-train:cpu
mkdir -p "$folder"

make_base() {
    debootstrap --variant=minbase "$suite" "$folder/base"
    # Behind a proxy with its own certificates, pip and apt in the image must trust what this machine trusts.
    mkdir -p "$folder/base/usr/local/share/ca-certificates"
    cp --recursive --no-clobber /usr/local/share/ca-certificates/. "$folder/base/usr/local/share/ca-certificates"
    local container
    container=$(buildah from scratch)
    buildah add --quiet "$container" "$folder/base" /
    buildah commit --quiet "$container" "$image-base"
    buildah rm "$container"
}

self_test() {
    local container
    container=$(buildah from "$image")
    # shellcheck disable=SC2064
    trap "buildah rm $container >/dev/null" EXIT
    # shellcheck disable=SC2016
    unshare --net bash -c 'ip link set lo up && exec buildah run --isolation chroot "$0" -- docker/smoke.sh' \
        "$container"
}

buildah inspect --type image "$image-base" >/dev/null 2>&1 || make_base
buildah build --layers --isolation chroot --build-arg BASE="localhost/$image-base" --file docker/Dockerfile --tag "$image" .
self_test
