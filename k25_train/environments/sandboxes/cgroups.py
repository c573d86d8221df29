"""Groups of processes with limits of memory, number and processors, where the kernel lets us make some.

Version 1: a group in each of the hierarchies `memory`, `pids` and `cpu`, at the root of what is mounted.
Version 2: one group below this process's own, or next to it, as delegation has it. A group's name has a label
(`owners.py`), so that groups of processes that were killed are found and removed by whoever comes next.
"""

import asyncio
import contextlib
import os
import signal
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from k25_train.environments.sandboxes import owners

ROOT = Path("/sys/fs/cgroup")
PREFIX = "k25-sandbox"
_PERIOD_US = 100_000
"""Of quotas of processor time."""


@dataclass(frozen=True, slots=True)
class Hierarchy:
    """Where groups can be made."""

    parent: Path
    """Folder in which a group is a folder."""
    limits: tuple[str, ...]
    """What it limits: `memory`, `pids`, `cpu`."""
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

    def memory_kills(self) -> int:
        """How many of its processes the kernel has killed for memory."""
        return self._count("oom_kill", "memory.oom_control", "memory.events")

    def process_refusals(self) -> int:
        """How many processes it was refused, as it had as many as it may."""
        return self._count("max", "pids.events")

    def throttled(self) -> int:
        """How many periods of 0.1 s it has spent waiting for a processor, as it had had its share."""
        return self._count("nr_throttled", "cpu.stat")

    def _count(self, key: str, *names: str) -> int:
        lines: list[str] = []
        for file in (folder / name for folder in self.folders for name in names):
            with contextlib.suppress(OSError):
                lines += file.read_text(encoding="utf-8").splitlines()
        return sum(int(line.split()[1]) for line in lines if line.startswith(f"{key} "))

    def kill(self) -> None:
        """Kill all that is in it now."""
        for folder in self.folders:
            _kill(folder)

    def remove(self, patience_s: float = 5.0) -> None:
        """Kill all that is in it until nothing is, and remove it. Gives up after `patience_s`."""
        for _ in self._removing(patience_s):
            time.sleep(0.002)

    async def vanish(self, patience_s: float = 5.0) -> None:
        """`remove` on an event loop."""
        for _ in self._removing(patience_s):
            await asyncio.sleep(0.002)

    def _removing(self, patience_s: float) -> Iterator[None]:
        deadline = time.monotonic() + patience_s
        waiting = list(self.folders)
        while waiting and time.monotonic() < deadline:
            waiting = [folder for folder in waiting if not _removed(folder)]
            if waiting:
                yield


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
    """Where this process may make groups; together they limit memory, pids, cpu, some of these or nothing."""
    if (root / "cgroup.controllers").exists():
        return [Hierarchy(parent, limits, 2) for parent, limits in _delegated(root, own_groups)][:1]
    return [
        Hierarchy(root / name, (name,), 1)
        for name in ("memory", "pids", "cpu")
        if os.access(root / name / "cgroup.procs", os.W_OK) and _can_make(root / name)
    ]


def _delegated(root: Path, own_groups: Path) -> Iterator[tuple[Path, tuple[str, ...]]]:
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
                yield parent, ("memory", "pids", *(("cpu",) if _gives_cpu(control) else ()))


def _gives_cpu(control: Path) -> bool:
    """Whether groups below can limit processors, which delegations often leave out."""
    try:
        if "cpu" not in control.read_text(encoding="utf-8").split():
            control.write_text("+cpu", encoding="utf-8")
    except OSError:
        return False
    return True


def _can_make(parent: Path) -> bool:
    trial = parent / f"{PREFIX}-{owners.this_process('').label(60)}"
    try:
        trial.mkdir()
        trial.rmdir()
    except OSError:
        return False
    return True


def make_group(
    where: list[Hierarchy], label: str, memory_bytes: int, processes: int, cpus: float = 0.0
) -> Group:
    """A new group with these limits, of processors none where `cpus` is 0.

    Raises OSError if it cannot be made.
    """
    name = f"{PREFIX}-{label}"
    made: list[Path] = []
    try:
        for hierarchy in where:
            folder = hierarchy.parent / name
            folder.mkdir()
            made.append(folder)
            _limit(folder, hierarchy, memory_bytes, processes, cpus)
    except OSError:
        Group(tuple(made)).remove()
        raise
    return Group(tuple(made))


def _limit(folder: Path, hierarchy: Hierarchy, memory_bytes: int, processes: int, cpus: float) -> None:
    is_second = hierarchy.version == 2
    if "cpu" in hierarchy.limits and cpus:
        quota = max(1000, int(cpus * _PERIOD_US))
        if is_second:
            (folder / "cpu.max").write_text(f"{quota} {_PERIOD_US}", encoding="utf-8")
        else:
            (folder / "cpu.cfs_period_us").write_text(str(_PERIOD_US), encoding="utf-8")
            (folder / "cpu.cfs_quota_us").write_text(str(quota), encoding="utf-8")
    if "pids" in hierarchy.limits:
        (folder / "pids.max").write_text(str(processes), encoding="utf-8")
    if "memory" in hierarchy.limits:
        limit = "memory.max" if is_second else "memory.limit_in_bytes"
        (folder / limit).write_text(str(memory_bytes), encoding="utf-8")
        # Not there without swap accounting; version 1 counts memory and swap together.
        swap, most = ("memory.swap.max", 0) if is_second else ("memory.memsw.limit_in_bytes", memory_bytes)
        with contextlib.suppress(OSError):
            (folder / swap).write_text(str(most), encoding="utf-8")


def remove_orphans(where: list[Hierarchy]) -> set[str]:
    """Remove groups that are nobody's any more, with what is in them; returns their labels."""
    here, now = owners.machine(), time.time()
    labels = set()
    for hierarchy in where:
        for folder in hierarchy.parent.glob(f"{PREFIX}-*"):
            label = folder.name.removeprefix(f"{PREFIX}-")
            if owners.may_be_removed(label, here, now):
                Group((folder,)).remove()
                labels.add(label)
    return labels
