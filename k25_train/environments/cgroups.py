"""Groups of processes with limits of memory and number, where the kernel lets this process make some.

Version 1: a group in each of the hierarchies `memory` and `pids`, at the root of what is mounted. Version 2:
one group below this process's own, or next to it, as delegation has it. A group's name has the process that
made it, so that groups of processes that were killed are found and removed by whoever comes next.
"""

import contextlib
import itertools
import os
import signal
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

ROOT = Path("/sys/fs/cgroup")
PREFIX = "k25-sandbox"
_NUMBER = itertools.count()


@dataclass(frozen=True, slots=True)
class Hierarchy:
    """Where groups can be made."""

    parent: Path
    """Folder in which a group is a folder."""
    limits: tuple[str, ...]
    """What it limits: `memory`, `pids`."""
    version: int
    """1 or 2."""


@dataclass(frozen=True, slots=True)
class Group:
    """The folders of one group, one in each hierarchy."""

    folders: tuple[Path, ...]

    @property
    def entrances(self) -> list[str]:
        """Files to which a process writes its id to belong to the group."""
        return [str(folder / "cgroup.procs") for folder in self.folders]

    def was_out_of_memory(self) -> bool:
        """Whether the kernel killed a process of it for memory."""
        lines: list[str] = []
        for folder in self.folders:
            for name in ("memory.oom_control", "memory.events"):
                with contextlib.suppress(OSError):
                    lines += (folder / name).read_text(encoding="utf-8").splitlines()
        return any(line.startswith("oom_kill ") and line.split()[1] != "0" for line in lines)

    def kill(self) -> None:
        """Kill all that is in it now."""
        for folder in self.folders:
            _kill(folder)

    def remove(self, patience_s: float = 5.0) -> None:
        """Kill all that is in it until nothing is, and remove it. Gives up after `patience_s`."""
        deadline = time.monotonic() + patience_s
        waiting = list(self.folders)
        while waiting and time.monotonic() < deadline:
            waiting = [folder for folder in waiting if not _removed(folder)]
            if waiting:
                time.sleep(0.002)


def _kill(folder: Path) -> None:
    kill = folder / "cgroup.kill"
    members: list[str] = []
    with contextlib.suppress(OSError):
        if kill.exists():
            kill.write_text("1", encoding="utf-8")
        members = (folder / "cgroup.procs").read_text(encoding="utf-8").split()
    for member in members:
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.kill(int(member), signal.SIGKILL)


def _removed(folder: Path) -> bool:
    _kill(folder)
    try:
        folder.rmdir()
    except FileNotFoundError:
        return True
    except OSError:
        return False
    return True


def hierarchies(root: Path = ROOT, own_groups: Path = Path("/proc/self/cgroup")) -> list[Hierarchy]:
    """Where this process may make groups; together they limit memory, pids, both or nothing."""
    if (root / "cgroup.controllers").exists():
        return [Hierarchy(parent, ("memory", "pids"), 2) for parent in _delegated(root, own_groups)][:1]
    return [
        Hierarchy(root / name, (name,), 1)
        for name in ("memory", "pids")
        if os.access(root / name / "cgroup.procs", os.W_OK) and _can_make(root / name)
    ]


def _delegated(root: Path, own_groups: Path) -> Iterator[Path]:
    own = next(
        (line[3:] for line in own_groups.read_text(encoding="utf-8").splitlines() if line.startswith("0::")),
        "/",
    )
    here = root / own.lstrip("/")
    for parent in (here, here.parent) if here != root else (here,):
        with contextlib.suppress(OSError):
            control = parent / "cgroup.subtree_control"
            if not {"memory", "pids"} <= set(control.read_text(encoding="utf-8").split()):
                control.write_text("+memory +pids", encoding="utf-8")
            if _can_make(parent):
                yield parent


def _can_make(parent: Path) -> bool:
    trial = parent / f"{PREFIX}-{_owner()}-trial{next(_NUMBER)}"
    try:
        trial.mkdir()
        trial.rmdir()
    except OSError:
        return False
    return True


def make_group(where: list[Hierarchy], memory_bytes: int, processes: int) -> Group:
    """A new group with these limits. Raises OSError if it cannot be made."""
    name = f"{PREFIX}-{_owner()}-{next(_NUMBER)}"
    made: list[Path] = []
    try:
        for hierarchy in where:
            folder = hierarchy.parent / name
            folder.mkdir()
            made.append(folder)
            _limit(folder, hierarchy, memory_bytes, processes)
    except OSError:
        Group(tuple(made)).remove()
        raise
    return Group(tuple(made))


def _limit(folder: Path, hierarchy: Hierarchy, memory_bytes: int, processes: int) -> None:
    is_second = hierarchy.version == 2
    if "pids" in hierarchy.limits:
        (folder / "pids.max").write_text(str(processes), encoding="utf-8")
    if "memory" in hierarchy.limits:
        limit = "memory.max" if is_second else "memory.limit_in_bytes"
        (folder / limit).write_text(str(memory_bytes), encoding="utf-8")
        # Not there without swap accounting; version 1 counts memory and swap together.
        swap, most = ("memory.swap.max", 0) if is_second else ("memory.memsw.limit_in_bytes", memory_bytes)
        with contextlib.suppress(OSError):
            (folder / swap).write_text(str(most), encoding="utf-8")


def remove_orphans(where: list[Hierarchy]) -> int:
    """Remove groups whose maker is gone; returns how many folders these were."""
    count = 0
    for hierarchy in where:
        for folder in hierarchy.parent.glob(f"{PREFIX}-*"):
            pid, _, started = folder.name.removeprefix(f"{PREFIX}-").partition(".")
            if pid.isdigit() and _started(int(pid)) != started.partition("-")[0]:
                Group((folder,)).remove()
                count += 1
    return count


def _owner() -> str:
    return f"{os.getpid()}.{_started(os.getpid())}"


def _started(pid: int) -> str:
    """When a process began, in clock ticks since the machine did; empty if it is gone."""
    try:
        return Path(f"/proc/{pid}/stat").read_text(encoding="utf-8").rpartition(")")[2].split()[19]
    except OSError:
        return ""
