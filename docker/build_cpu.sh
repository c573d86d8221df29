#!/usr/bin/env bash
# Builds the CPU image from Debian's packages alone, without a container runtime, and tests it:
#   docker/build_cpu.sh [FOLDER] [OPTION_OF_BUILD_SH...]     where the base is built (build/docker)
# The base is what Debian has today, or on the day of a snapshot that DEBIAN_MIRROR names; FOLDER/base.packages has its
# packages with versions. Needs root and: apt-get install buildah debootstrap git iproute2. Takes 15 GB of disk.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
folder=${1:-build/docker}
[ "$#" -eq 0 ] || shift
suite=trixie  # Debian's first release with Python 3.12 or newer
image=k25-train:cpu
base=localhost/k25-train-base
export BUILDAH_ISOLATION=chroot TOOL=buildah
# Behind a proxy with its own certificates, pip must trust what this machine trusts; the image gets none of it.
export CA_BUNDLE=${CA_BUNDLE:-/etc/ssl/certs/ca-certificates.crt}
mkdir -p "$folder"

make_base() {
    if [ ! -d "$folder/base" ]; then
        rm -rf "$folder/base.partial"
        debootstrap --variant=minbase "$suite" "$folder/base.partial" ${DEBIAN_MIRROR:+"$DEBIAN_MIRROR"}
        mv "$folder/base.partial" "$folder/base"
    fi
    rm -rf "$folder"/base/var/cache/apt/* "$folder"/base/var/lib/apt/lists/* "$folder"/base/var/log/*
    local container
    container=$(buildah from scratch)
    buildah add --quiet "$container" "$folder/base" /
    buildah commit --quiet "$container" "$base"
    buildah rm "$container"
}

buildah inspect --type image "$base" >/dev/null 2>&1 || make_base
dpkg-query --root "$folder/base" --show >"$folder/base.packages"
echo "base: $(wc -l <"$folder/base.packages") packages, sha256 $(sha256sum <"$folder/base.packages")"
digest=$(buildah inspect --type image --format '{{.FromImageDigest}}' "$base")
docker/build.sh --tag "$image" --out "$folder" "$@" "$base@$digest"

container=$(buildah from "$image")
trap 'buildah rm "$container" >/dev/null' EXIT
root=$(buildah mount "$container")
bytes=$(du --summarize --bytes --one-file-system "$root" | cut -f1)
echo "size: $((bytes / 1000000)) MB"
docker/try.sh "$root"
docker/try.sh "$root" 12345
