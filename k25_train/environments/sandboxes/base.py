"""A sandbox in which an agent works, turn by turn.

    Sandboxes.open(spec) ─► SandboxSession: run, start, write, read, snapshot ─► close

What has been opened carries its owner's name and the time at which it may be removed by anybody, so that
nothing is left behind when an owner is killed (`Sandboxes.reconcile`).
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from enum import StrEnum
from typing import Protocol

from k25_train.errors import K25Error

WORK = "/work"
"""Folder in which an agent works, and which alone it may write to."""


class SandboxError(K25Error):
    """A sandbox could not be had, or is gone: the machine's fault, never the policy's."""


class Ending(StrEnum):
    """How a command ended."""

    EXITED = "exited"
    """By itself, with whatever status."""
    OUT_OF_TIME = "out of time"
    OUT_OF_MEMORY = "out of memory"
    TOO_MUCH_OUTPUT = "too much output"


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
        """Write a file, with its folders."""

    async def read(self, path: str, max_bytes: int) -> bytes:
        """Read a regular file. Raises FileNotFoundError, and ValueError for one that is longer or no file."""

    async def snapshot(self, max_bytes: int) -> dict[str, bytes]:
        """Path below `WORK` -> content of all regular files, no links or devices. Raises ValueError for more
        bytes than that."""

    async def close(self) -> None:
        """End it with all that runs in it. Twice is as once."""


class Sandboxes(Protocol):
    """Opens sandboxes of one kind."""

    async def open(self, spec: SandboxSpec) -> SandboxSession:
        """A new one. Waits while there are as many as there may be."""

    async def reconcile(self) -> int:
        """Remove those whose owner is gone, or whose time is over; returns how many these were."""

    async def close(self) -> None:
        """Close all that are open."""
