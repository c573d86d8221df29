"""Whose a sandbox is, as a label that other processes and machines can judge.

    PID.START.MACHINE.RUN-EXPIRES-NUMBER       4711.8812345.3fa9c1d2.00c0ffee-1790000000-12

MACHINE is a digest of the boot and of the namespace in which PID counts: of other machines, boots and
containers it cannot be said whether an owner lives, so that what is theirs stays until it expires.
"""

import hashlib
import itertools
import os
import time
from dataclasses import dataclass
from pathlib import Path

_NUMBER = itertools.count()


@dataclass(frozen=True, slots=True)
class Owner:
    """A process that opens sandboxes."""

    pid: int
    started: str
    """When it began, in clock ticks since the machine did."""
    machine: str
    """Digest of boot and namespace of processes."""
    run: str
    """Digest of the run's name."""

    @property
    def text(self) -> str:
        """First part of its labels: digits, letters of hexadecimal numbers, and dots."""
        return f"{self.pid}.{self.started}.{self.machine}.{self.run}"

    def label(self, ttl_s: float) -> str:
        """A new label, which expires in so many seconds."""
        return f"{self.text}-{int(time.time() + ttl_s)}-{next(_NUMBER)}"


def this_process(run: str) -> Owner:
    """The owner that this process is.

    Args:
        run: name of the run.
    """
    pid = os.getpid()
    return Owner(pid, started(pid) or "0", machine(), _digest(run))


def machine() -> str:
    """Digest of this machine's boot and this process's namespace of processes."""
    boot = Path("/proc/sys/kernel/random/boot_id").read_text(encoding="ascii").strip()
    return _digest(f"{boot} {os.readlink('/proc/self/ns/pid')}")


def started(pid: int) -> str:
    """When a process began, in clock ticks since the machine did; empty if it is gone."""
    try:
        return Path(f"/proc/{pid}/stat").read_text(encoding="utf-8").rpartition(")")[2].split()[19]
    except OSError:
        return ""


def may_be_removed(label: str, here: str, now: float) -> bool:
    """Whether what has a label belongs to nobody any more.

    Args:
        label: as `Owner.label` wrote it; others are nobody's business.
        here: `machine()`.
        now: seconds since 1970.
    """
    try:
        owner, expires, _ = label.split("-")
        pid, began, where, _ = owner.split(".")
        is_dead = where == here and started(int(pid)) != began
        return is_dead or now >= int(expires)
    except ValueError:
        return False


def _digest(text: str) -> str:
    return hashlib.blake2b(text.encode(), digest_size=4).hexdigest()
