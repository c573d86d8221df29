#!/usr/bin/env bash
# Builds the image of a commit with whichever of docker, podman and buildah is there (or TOOL):
#   docker/build.sh [--tag TAG] [--out FOLDER] [--allow-tag] [--allow-changes] BASE [BUILD_OPTION...]
# BASE is NAME@sha256:DIGEST. A name alone is refused, since it may be another image tomorrow, unless --allow-tag
# says so. A checkout with local changes is refused, since nobody could build the image again; with
# --allow-changes the image says that it has some. The bill of materials is written to FOLDER (build/docker).
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

fail() {
    echo "$1" >&2
    exit 2
}

tag=k25-train out=build/docker allow_tag=no allow_changes=no
while [ "$#" -gt 0 ]; do
    case $1 in
        --tag) tag=$2 && shift ;;
        --out) out=$2 && shift ;;
        --allow-tag) allow_tag=yes ;;
        --allow-changes) allow_changes=yes ;;
        -*) fail "$1: unknown option; options of the build come behind BASE" ;;
        *) break ;;
    esac
    shift
done
[ "$#" -gt 0 ] || fail "usage: docker/build.sh [--tag TAG] [--out FOLDER] [--allow-tag] [--allow-changes] BASE"
base=$1
shift

# 1. What it is built on.
if [[ $base =~ ^[^@]+@sha256:[0-9a-f]{64}$ ]]; then
    digest=${base#*@}
elif [ "$allow_tag" = yes ] && [[ $base != *@* ]]; then
    digest=
else
    fail "BASE=$base: must be NAME@sha256:DIGEST (\`docker buildx imagetools inspect NAME\` prints it), or --allow-tag"
fi

# 2. What it is built from.
scratch=$(mktemp --directory)
trap 'rm -rf "$scratch"' EXIT
revision=$(git rev-parse HEAD) || fail "the image is built from a git checkout, so that it can say of which commit it is"
if [ -n "$(git status --porcelain)" ]; then
    [ "$allow_changes" = yes ] || {
        git status --short >&2
        fail "these changes are in no commit: commit them, or --allow-changes"
    }
    revision="$revision, with local changes"
    context=.
else
    # The commit itself, so that nothing slips in while the build goes on.
    context=$scratch
    git archive "$revision" | tar --extract --directory "$context"
fi
version=$(sed -n 's/^    version="\(.*\)",$/\1/p' setup.py)
epoch=${SOURCE_DATE_EPOCH:-$(git log -1 --format=%ct)}

# 3. With what it is built.
for tool in ${TOOL:-docker podman buildah}; do
    if command -v "$tool" >/dev/null; then break; fi
done
command -v "$tool" >/dev/null || fail "none of docker, podman and buildah is installed"
build=("$tool" build)
[ "$tool" = docker ] || build+=(--layers)
[ -z "${CA_BUNDLE:-}" ] || build+=(--secret "id=ca-bundle,src=$CA_BUNDLE")
build+=(
    --file "$context/docker/Dockerfile"
    --build-arg "BASE=$base"
    --build-arg "BASE_NAME=${base%@*}"
    --build-arg "BASE_DIGEST=$digest"
    --build-arg "ALLOW_TAG=$allow_tag"
    --build-arg "REVISION=$revision"
    --build-arg "VERSION=$version"
    --build-arg "SOURCE_DATE_EPOCH=$epoch"
    --build-arg "CREATED=$(date --utc --date "@$epoch" +%Y-%m-%dT%H:%M:%SZ)"
)

# 4. The image, then its bill of materials from the same layers.
"${build[@]}" "$@" --tag "$tag" "$context"
mkdir -p "$out"
sbom=$out/${tag//[\/:]/-}.spdx.json
case $tool in
    buildah)
        container=$(buildah from "$tag")
        cp "$(buildah mount "$container")/usr/share/k25-train/sbom.spdx.json" "$sbom"
        buildah rm "$container" >/dev/null
        ;;
    *) "$tool" run --rm "$tag" sbom >"$sbom" ;;
esac
echo "image $tag of ${revision}; bill of materials in $sbom"
