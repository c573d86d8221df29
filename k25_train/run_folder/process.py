"""Which process holds something, in terms that another process, on any machine, can check."""

import os
import socket
from dataclasses import dataclass
from enum import Enum
from pathlib import Path

PROC = Path("/proc")


class Liveness(Enum):
    """Whether a process runs, as far as this process can tell without watching it."""

    alive = "alive"
    dead = "dead"
    unknown = "unknown"
    """It is on another machine, or in a container whose processes cannot be seen from here."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Process:
    """A process, told apart from any other on any machine, before or after a reboot."""

    host: str
    """Name of its machine."""
    boot_id: str
    """Identity of the machine's current boot; empty if unknown."""
    pid_namespace: str
    """Identity of the namespace that `pid` counts in, which containers have their own of; empty if
    unknown."""
    pid: int
    started_ticks: int
    """When it started, in clock ticks since boot: a process id is used again. -1 if unknown."""


def this_process() -> Process:
    """The calling process."""
    pid = os.getpid()
    return Process(
        host=socket.gethostname(),
        boot_id=_boot_id(),
        pid_namespace=_pid_namespace(),
        pid=pid,
        started_ticks=_started_ticks(pid),
    )


def liveness(process: Process) -> Liveness:
    """Whether the process runs. Only the processes of this machine, boot and container can be looked up."""
    own = (socket.gethostname(), _boot_id(), _pid_namespace())
    if "" in own or own != (process.host, process.boot_id, process.pid_namespace):
        return Liveness.unknown
    try:
        os.kill(process.pid, 0)
    except ProcessLookupError:
        return Liveness.dead
    except (PermissionError, OverflowError):
        # Another user's, which runs; or no process id at all, which the start below tells.
        pass
    found = _started_ticks(process.pid)
    if -1 in (found, process.started_ticks):
        return Liveness.unknown
    return Liveness.alive if found == process.started_ticks else Liveness.dead


def _boot_id() -> str:
    return _read(PROC / "sys/kernel/random/boot_id")


def _pid_namespace() -> str:
    try:
        return os.readlink(PROC / "self/ns/pid")
    except OSError:
        return ""


def _started_ticks(pid: int) -> int:
    """Start of a process; -1 where the system hides it. A process that has ended and waits to be collected
    has none either way: 0, which no living one has."""
    # The program's name, in parentheses, may contain anything.
    fields = _read(PROC / str(pid) / "stat").rpartition(")")[2].split()
    if len(fields) < 20:
        return -1
    return 0 if fields[0] in "ZX" else int(fields[19])


def _read(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8", errors="replace").strip()
    except OSError:
        return ""
