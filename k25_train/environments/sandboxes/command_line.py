"""The command line of a sandbox: limits first, then bubblewrap's namespaces and mounts, then the command."""

import contextlib
import functools
import json
import os
import signal
import site
import sys
from asyncio.subprocess import Process
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from k25_train.environments.sandboxes.base import WORK

OURS = ("k25_train", "parallel", "launch", "tests", "reasoning_gym")
"""Packages that no sandbox sees: from these the answers of generated tasks could be computed."""
_LAUNCH = """
ulimit -c 0 && ulimit -n {files} && ulimit -t {cpu_s} && ulimit -f {file_blocks} &&
ulimit -v {address_kib} || exit 96
while [ "$1" != -- ]; do echo $$ > "$1" || exit 97; shift; done
shift; exec "$@"
"""
_SYSTEM = ("/usr", "/lib", "/lib64", "/bin", "/sbin")
_SETTINGS = ("/etc/alternatives", "/etc/ld.so.cache", "/etc/fonts", "/etc/mime.types")
_NETWORK = ("/etc/resolv.conf", "/etc/hosts", "/etc/nsswitch.conf", "/etc/ssl", "/etc/ca-certificates")
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


@dataclass(frozen=True, slots=True, kw_only=True)
class View:
    """What is seen within, the system apart."""

    disk_bytes: int
    """What /work, /tmp and /dev/shm hold, each of them."""
    contents: Mapping[str, int]
    """Absolute path -> number of an open file with what is there, read-only."""
    folders: Mapping[str, Path] = field(default_factory=dict)
    """Absolute path -> folder of this machine that is there, read-only."""
    variables: Mapping[str, str] = field(default_factory=dict)
    """Of the environment."""
    network: bool = False
    """Whether this machine's network is there."""


def scheduled_as_others() -> None:
    """Have what this thread starts be scheduled as any program, though the thread itself is not.

    Root's real-time priority is inherited: code in a sandbox would go before everything else, and groups that
    limit processors refuse it. Libraries take it without a word, as SVT-AV1's encoder does.
    """
    policy = os.sched_getscheduler(0)
    if policy in (os.SCHED_FIFO, os.SCHED_RR):
        os.sched_setscheduler(0, policy | os.SCHED_RESET_ON_FORK, os.sched_getparam(0))


def launcher(limits: Limits, entrances: Sequence[str], limits_memory: bool) -> list[str]:
    """What takes the limits and enters the group before it becomes what is appended.

    Args:
        limits: of the run.
        entrances: files of the group.
        limits_memory: whether the group limits memory, so that address space need not.
    """
    address = limits.memory_bytes * (_ADDRESS_SPACE if limits_memory else 1)
    script = _LAUNCH.format(
        files=256,
        cpu_s=limits.cpu_s,
        file_blocks=-(-limits.disk_bytes // 512),
        address_kib=-(-address // 1024),
    )
    return ["/bin/sh", "-c", script, "sh", *entrances, "--"]


def session_launcher(
    disk_bytes: int, memory_bytes: int, cpu_s: int, entrances: Sequence[str], limited: Collection[str]
) -> list[str]:
    """The same for a sandbox that lives on: what its group limits, no process of it has to.

    Args:
        disk_bytes: of the longest file.
        memory_bytes: of address space, where the group does not limit memory: browsers and interpreters
            reserve far more than they use.
        cpu_s: seconds of computing of each process, where the group does not limit processors.
        entrances: files of the group.
        limited: what the group limits.
    """
    script = _LAUNCH.format(
        files=4096,
        cpu_s="unlimited" if "cpu" in limited else cpu_s,
        file_blocks=-(-disk_bytes // 512),
        address_kib="unlimited" if "memory" in limited else -(-memory_bytes // 1024),
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


def bubblewrap(view: View) -> list[str]:
    """bubblewrap with all that it isolates; further options, `--` and the command are appended."""
    options = [
        "bwrap", "--unshare-all", "--unshare-user", "--disable-userns", "--uid", "65534", "--gid", "65534",
        "--die-with-parent", "--new-session", "--cap-drop", "ALL", "--hostname", "sandbox",
        "--clearenv", "--setenv", "PATH", "/usr/bin:/bin", "--setenv", "HOME", WORK,
        "--setenv", "LANG", "C.UTF-8",
    ]  # fmt: skip
    for name, value in view.variables.items():
        options += ["--setenv", name, value]

    # 1. The system.
    for folder in _SYSTEM:
        path = Path(folder)
        if path.is_symlink():
            options += ["--symlink", os.readlink(path), folder]
        elif path.exists():
            options += ["--ro-bind", folder, folder]
    shown = [Path(folder) for folder in _SYSTEM]
    if not Path(sys.base_prefix).is_relative_to("/usr"):
        options += ["--ro-bind", sys.base_prefix, sys.base_prefix]
        shown.append(Path(sys.base_prefix))
    for file in (*_SETTINGS, *(_NETWORK if view.network else ())):
        options += ["--ro-bind-try", file, file]
    if view.network:
        options += ["--share-net"]

    # 2. What it may write to. /proc is read-only: where root starts it, the code owns root's files, sysctls
    # among them, although it has none of root's capabilities.
    size = ["--size", str(view.disk_bytes), "--tmpfs"]
    options += ["--dev", "/dev", *size, "/dev/shm", "--remount-ro", "/dev", "--proc", "/proc"]
    options += ["--remount-ro", "/proc", *size, "/tmp", *size, WORK]

    # 3. What it is given, and what is taken away of that.
    for name, given in view.folders.items():
        options += ["--ro-bind", str(given), name]
    seen = {**view.folders, **{str(each): each for each in shown}}
    for hidden in _hidden_folders(tuple(seen.items())):
        options += ["--size", "4096", "--tmpfs", hidden, "--remount-ro", hidden]
    for name, descriptor in view.contents.items():
        options += ["--ro-bind-data", str(descriptor), name]
    return [*options, "--remount-ro", "/", "--chdir", WORK]


@functools.lru_cache(maxsize=64)
def _hidden_folders(seen: tuple[tuple[str, Path], ...]) -> list[str]:
    """Where our packages would be seen within: absolute path within, and folder of this machine, of each."""
    found = set()
    for place in _import_places():
        for within, folder in seen:
            if place.is_relative_to(folder):
                here = Path(within) / place.relative_to(folder)
                found |= {str(here / name) for name in OURS if (place / name).is_dir()}
    return sorted(found)


@functools.cache
def _import_places() -> tuple[Path, ...]:
    """Folders from which this Python imports, and where this project is."""
    project = Path(__file__).resolve().parents[3]
    return tuple(
        {Path(place).resolve() for place in (*sys.path, *site.getsitepackages()) if place} | {project}
    )


def kill(process: Process) -> None:
    """Kill a process. Unlike its own method, this leaves it to the event loop to take note of its end."""
    if process.returncode is None:
        with contextlib.suppress(ProcessLookupError):
            os.kill(process.pid, signal.SIGKILL)


def exit_status(descriptor: int) -> int | None:
    """Exit status that bubblewrap has stated; None if it was killed, or could not start the command."""
    os.set_blocking(descriptor, False)
    try:
        lines = os.read(descriptor, 1 << 16).decode().splitlines()
    except BlockingIOError:
        return None
    states = [json.loads(line) for line in lines if line.strip()]
    return next((int(state["exit-code"]) for state in states if "exit-code" in state), None)


def refusal_of(said: bytes) -> str:
    """Why bubblewrap set up no sandbox, from what it wrote."""
    text = said.decode(errors="replace").strip()[-400:] or "it said nothing"
    remedy = "run `bwrap --unshare-all --ro-bind / / true` by hand"
    if any(word in text for word in ("namespace", "not permitted", "uid map")):
        remedy = "allow user namespaces: sysctl kernel.unprivileged_userns_clone, user.max_user_namespaces"
    return f"bubblewrap cannot set up a sandbox: {text}\n  -> {remedy}"
