#!/usr/bin/env bash
# Runs an image's self-test as strictly as a cluster may run it, without a container runtime: nothing but loopback,
# a read-only root file system, memory as /tmp, a folder for runs, and any user:
#   try.sh ROOT [USER_NUMBER]     ROOT: the image's files; the user of the image by default
# Needs root.
set -euo pipefail
root=$1 user=${2:-1000}
runs=$(mktemp --directory)
trap 'rm -rf "$runs"' EXIT
chmod 1777 "$runs"

inside() {
    # The variables are those of the image; nothing of this machine's.
    # shellcheck disable=SC2016
    root=$root user=$user runs=$runs unshare --mount --net --pid --fork --kill-child bash -euo pipefail -c '
        ip link set lo up
        mount --bind "$root" "$root"
        mount --options remount,bind,ro "$root"
        mount --types proc proc "$root/proc"
        mount --types sysfs --options ro sysfs "$root/sys"
        mount --rbind /dev "$root/dev"
        mount --types tmpfs tmpfs "$root/dev/shm"
        mount --types tmpfs tmpfs "$root/tmp"
        mount --bind "$runs" "$root/runs"
        if touch "$root/opt/k25-train/x" 2>/dev/null; then echo "the root file system is writable" >&2; exit 1; fi
        exec chroot --userspec "$user:$user" --groups "" "$root" env --ignore-environment \
            --chdir /opt/k25-train VIRTUAL_ENV=/opt/venv PIP_NO_INDEX=1 PYTHONDONTWRITEBYTECODE=1 \
            PATH=/opt/venv/bin:/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin \
            tini -s -- docker/entrypoint.sh "$@"
    ' bash "$@"
}

inside self-test
# In the default run folder, as a first user would.
inside train experiment=smoke parallelism=serial cluster.gpus_per_node=1 train.steps=2 train.eval_sequences=8 \
    optim.warmup=1 optim.decay=1 checkpoint.interval=2
[ -d "$runs/smoke/checkpoints/step_2" ] || { echo "no checkpoint in /runs/smoke" >&2; exit 1; }
inside revision
echo "user $user on a read-only root file system: passed"
