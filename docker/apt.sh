#!/usr/bin/env bash
# Installs Debian packages for commands that the base does not have, and nothing newer over what it has:
#   apt.sh COMMAND=PACKAGE... [-- COMMAND=PACKAGE...]
# Those behind -- are left out where the base's package sources have none of that name; the image says so in
# /usr/share/k25-train/absent.
set -euo pipefail

required=() optional=() absent=()
for word in "$@"; do
    if [ "$word" = -- ]; then
        seen=1
    elif command -v "${word%%=*}" >/dev/null || [ -e "${word%%=*}" ]; then
        echo "${word%%=*}: the base's own"
    elif [ "${seen:-}" ]; then
        optional+=("$word")
    else
        required+=("${word#*=}")
    fi
done

apt-get update
for word in "${optional[@]}"; do
    if apt-cache show "${word#*=}" >/dev/null 2>&1; then
        required+=("${word#*=}")
    else
        absent+=("${word%%=*}: no package ${word#*=} in the base's sources")
    fi
done
if [ "${#required[@]}" -gt 0 ]; then
    DEBIAN_FRONTEND=noninteractive apt-get install --yes --no-install-recommends --no-upgrade "${required[@]}"
fi
apt-get clean
rm -rf /var/lib/apt/lists/* /var/log/apt /var/log/dpkg.log /var/log/alternatives.log /var/cache/ldconfig/aux-cache
install --directory /usr/share/k25-train
printf '%s\n' "${absent[@]+"${absent[@]}"}" | tee -a /usr/share/k25-train/absent
