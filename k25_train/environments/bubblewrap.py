"""The command line of a sandbox: limits first, then bubblewrap's namespaces and mounts, then the command."""

import contextlib
import json
import os
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

WORK = "/work"
"""Folder that the code may write to."""
_LAUNCH = """
ulimit -c 0 && ulimit -n 256 && ulimit -t {cpu_s} && ulimit -f {file_blocks} &&
ulimit -v {address_kib} || exit 96
while [ "$1" != -- ]; do echo $$ > "$1" || exit 97; shift; done
shift; exec "$@"
"""
_SYSTEM = ("/usr", "/lib", "/lib64", "/bin")
_ADDRESS_SPACE = 4
"""Address space, as a multiple of memory where a group limits that: programs reserve more than they use."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Limits:
    """What one run may take."""

    wall_s: float
    """Seconds until it is killed."""
    cpu_s: int
    """Seconds of computing of each process."""
    memory_bytes: int
    """Memory of all its processes, files in /work included."""
    disk_bytes: int
    """Files in /work."""
    output_bytes: int
    """What it may write to its standard output and error together."""
    processes: int
    """Processes and threads at once."""


def launcher(limits: Limits, entrances: Sequence[str], limits_memory: bool) -> list[str]:
    """What takes the limits and enters the group before it becomes what is appended.

    Args:
        limits: of the run.
        entrances: files of the group.
        limits_memory: whether the group limits memory, so that address space need not.
    """
    address = limits.memory_bytes * (_ADDRESS_SPACE if limits_memory else 1)
    script = _LAUNCH.format(
        cpu_s=limits.cpu_s, file_blocks=-(-limits.disk_bytes // 512), address_kib=-(-address // 1024)
    )
    return ["/bin/sh", "-c", script, "sh", *entrances, "--"]


def in_memory(content: bytes, stack: contextlib.ExitStack) -> int:
    """A file without a name that has the content, open at its start."""
    descriptor = os.memfd_create("k25")
    stack.callback(os.close, descriptor)
    with open(descriptor, "wb", closefd=False) as file:
        file.write(content)
    os.lseek(descriptor, 0, os.SEEK_SET)
    return descriptor


def bubblewrap(limits: Limits, contents: Mapping[str, int], status: int) -> list[str]:
    """bubblewrap with all that it isolates; the command is appended.

    Args:
        limits: of the run.
        contents: absolute path -> number of an open file with what is there, read-only.
        status: number of the open file to which it says how the command ended.
    """
    options = [
        "bwrap", "--unshare-all", "--unshare-user", "--disable-userns", "--uid", "65534", "--gid", "65534",
        "--die-with-parent", "--new-session", "--cap-drop", "ALL", "--hostname", "sandbox",
        "--json-status-fd", str(status),
        "--clearenv", "--setenv", "PATH", "/usr/bin:/bin", "--setenv", "HOME", WORK,
        "--setenv", "LANG", "C.UTF-8",
    ]  # fmt: skip
    for folder in _SYSTEM:
        path = Path(folder)
        if path.is_symlink():
            options += ["--symlink", os.readlink(path), folder]
        elif path.exists():
            options += ["--ro-bind", folder, folder]
    if not Path(sys.base_prefix).is_relative_to("/usr"):
        options += ["--ro-bind", sys.base_prefix, sys.base_prefix]
    # Read-only: where root starts it, the code owns root's files, sysctls among them, although it has none of
    # root's capabilities.
    options += ["--dev", "/dev", "--proc", "/proc", "--remount-ro", "/proc"]
    for name, descriptor in contents.items():
        options += ["--ro-bind-data", str(descriptor), name]
    options += ["--size", str(limits.disk_bytes), "--tmpfs", WORK, "--remount-ro", "/", "--chdir", WORK, "--"]
    return options


def exit_status(descriptor: int) -> int | None:
    """Exit status that bubblewrap has stated; None if it was killed, or could not start the command."""
    os.set_blocking(descriptor, False)
    try:
        lines = os.read(descriptor, 1 << 16).decode().splitlines()
    except BlockingIOError:
        return None
    states = [json.loads(line) for line in lines if line.strip()]
    return next((int(state["exit-code"]) for state in states if "exit-code" in state), None)
