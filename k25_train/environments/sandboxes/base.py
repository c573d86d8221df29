"""A sandbox in which an agent works, turn by turn.

    Sandboxes.open(spec) ─► SandboxSession: run, start, write, read, snapshot ─► close

What has been opened carries its owner's name and the time at which it may be removed by anybody, so that
nothing is left behind when an owner is killed (`Sandboxes.reconcile`).
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from enum import StrEnum
from pathlib import Path
from typing import Protocol

from k25_train.errors import K25Error

WORK = "/work"
"""Folder in which an agent works, and which alone it may write to."""
KILL_ALL = ("/bin/sh", "-c", "kill -9 -1")
"""Ends all but itself and the sandbox's first process, at once."""


class SandboxError(K25Error):
    """A sandbox could not be had, or is gone: the machine's fault, never the policy's."""


class Ending(StrEnum):
    """How a command ended."""

    EXITED = "exited"
    """By itself, with whatever status."""
    OUT_OF_TIME = "out of time"
    OUT_OF_MEMORY = "out of memory"
    TOO_MUCH_OUTPUT = "too much output"
    DESTROYED = "sandbox destroyed"
    """What ran in the sandbox has ended the sandbox itself, now or before: the policy's doing."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Finished:
    """What became of a command."""

    ending: Ending
    status: int
    """Exit status, 128 and the signal's number for one that was killed."""
    stdout: bytes
    """What it printed, as far as it may."""
    stderr: bytes
    """The same of its errors."""


@dataclass(frozen=True, slots=True, kw_only=True)
class SandboxLimits:
    """What one sandbox may take: `environment.sandbox` of the configuration."""

    cpus: float
    """Processors."""
    memory_bytes: int
    """Memory of all processes, files in memory included."""
    disk_bytes: int
    """Files in `WORK`."""
    processes: int
    """Processes and threads at once."""
    output_bytes: int
    """What one command may print."""
    ttl_s: float
    """Seconds that it may live."""


@dataclass(frozen=True, slots=True, kw_only=True)
class SandboxSpec:
    """What a sandbox is to be like."""

    name: str
    """For messages and labels, such as the task's key."""
    files: Mapping[str, bytes] = field(default_factory=dict)
    """Path below `WORK`, or absolute and then read-only -> content."""
    network: bool = False
    """Whether it may reach the network."""
    image: str = ""
    """Other image than the configured one; empty for that."""
    folders: Mapping[str, Path] = field(default_factory=dict)
    """Absolute path within -> folder of this machine that is seen there, read-only, such as a corpus."""
    ports: tuple[int, ...] = ()
    """Ports of this machine's loopback, such as the gateway's, that are reached under the same numbers of its
    own loopback, without a network."""


class Process(Protocol):
    """A command that goes on in a sandbox while others run, such as a kernel."""

    async def write(self, data: bytes) -> None:
        """To its standard input."""

    async def read_line(self, timeout_s: float) -> bytes:
        """The next line of its standard output, empty at its end. Raises TimeoutError."""

    async def close(self) -> None:
        """End it."""


class SandboxSession(Protocol):
    """One open sandbox. Every method may raise `SandboxError`."""

    @property
    def name(self) -> str:
        """Names it in messages."""

    async def run(
        self,
        command: Sequence[str],
        *,
        timeout_s: float,
        stdin: bytes = b"",
        variables: Mapping[str, str] | None = None,
    ) -> Finished:
        """Run a command in `WORK` until it ends, or a limit ends it; what it started otherwise goes on."""

    async def start(self, command: Sequence[str], variables: Mapping[str, str] | None = None) -> Process:
        """Start a command that goes on."""

    async def write(self, path: str, content: bytes) -> None:
        """Write a file, with its folders. Raises OSError where the sandbox has no room or no place for it."""

    async def read(self, path: str, max_bytes: int) -> bytes:
        """Read a regular file. Raises FileNotFoundError, ValueError for one that is longer or no file, and
        other OSErrors for one that may not be read."""

    async def snapshot(self, max_bytes: int) -> dict[str, bytes]:
        """Path below `WORK` -> content of all regular files, no links or devices, where the
        folder is readable; nothing of a sandbox that was destroyed from within. Raises ValueError for more
        bytes than that, names included."""

    async def close(self) -> None:
        """End it with all that runs in it. Twice is as once."""


class Sandboxes(Protocol):
    """Opens sandboxes of one kind."""

    @property
    def contained(self) -> Mapping[str, int]:
        """How often which limit has held, by cause: an `Ending`, `processes`, `processors`, `disk` or
        `expired`."""

    async def open(self, spec: SandboxSpec) -> SandboxSession:
        """A new one. Waits while there are as many as there may be."""

    async def reconcile(self) -> int:
        """Remove those whose owner is gone, or whose time is over; returns how many these were."""

    async def close(self) -> None:
        """Close all that are open."""
