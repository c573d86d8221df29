"""What a node shows of itself: files, file systems, and what commands print. The only reader of them.

Tests give another root and recorded outputs; whoever reads through a `Machine` runs on both alike.
"""

import contextlib
import os
import shutil
import socket
import subprocess
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

COMMAND_TIMEOUT_S = 30.0
"""A healthy nvidia-smi answers within seconds; with a GPU that fell off the bus it may hang for good."""


class AbsentError(Exception):
    """The machine lacks what was asked for, so there is nothing to judge."""


class BrokenError(Exception):
    """What was asked for is there and does not work, which is a finding in itself."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Usage:
    """A file system, in bytes."""

    total_bytes: int
    free_bytes: int


def run_command(words: Sequence[str]) -> str:
    """Standard output of a command.

    Raises:
        AbsentError: the machine does not have the command.
        BrokenError: the command fails, or does not answer in time.
    """
    try:
        done = subprocess.run(
            words, capture_output=True, text=True, timeout=COMMAND_TIMEOUT_S, check=False, errors="replace"
        )
    except FileNotFoundError as error:
        raise AbsentError(f"no {words[0]} on this machine") from error
    except subprocess.TimeoutExpired as error:
        raise BrokenError(f"{' '.join(words)}: no answer in {COMMAND_TIMEOUT_S:g} s") from error
    if done.returncode:
        said = " ".join((done.stdout + done.stderr).split())
        raise BrokenError(f"{' '.join(words)}: status {done.returncode}: {said}")
    return done.stdout


def resolve_own_name() -> str | None:
    """The IPv4 address of this host's name, as libraries look it up; None if the name is unknown."""
    try:
        return socket.gethostbyname(socket.gethostname())
    except OSError:
        return None


def usage_of(path: Path) -> Usage:
    """The file system that `path` is on, or will be on once it is made."""
    while not path.exists():
        path = path.parent
    usage = shutil.disk_usage(path)
    return Usage(total_bytes=usage.total, free_bytes=usage.free)


@dataclass(frozen=True, slots=True, kw_only=True)
class Machine:
    """A node, or a recorded one."""

    root: Path = Path("/")
    """Where the file tree starts."""
    run: Callable[[Sequence[str]], str] = run_command
    """Words of a command -> what it prints; raises `AbsentError` or `BrokenError`."""
    resolve: Callable[[], str | None] = resolve_own_name
    """The IPv4 address that the host's name stands for, None if none."""
    environment: Mapping[str, str] = field(default_factory=lambda: dict(os.environ))
    """Variables of this process."""
    usage: Callable[[Path], Usage] = usage_of
    """Path -> size and free space of its file system."""

    def read(self, path: str) -> str | None:
        """Contents of a file without surrounding white space; None where it is absent or cannot be read.

        The kernel shows unused table entries as files whose reading fails, so the two mean the same.
        """
        try:
            return (self.root / path).read_text(errors="replace").strip()
        except OSError:
            return None

    def names(self, folder: str) -> list[str]:
        """Names in a folder, numbers in their order; none where the folder is absent."""
        try:
            names = [entry.name for entry in (self.root / folder).iterdir()]
        except OSError:
            return []
        return sorted(names, key=lambda name: (not name.isdigit(), int(name) if name.isdigit() else 0, name))

    def bytes_in(self, folder: str) -> int:
        """Size of all files below a folder; none where it is absent."""
        found = 0
        for parent, _, names in (self.root / folder).walk():
            for name in names:
                # A file may be deleted meanwhile.
                with contextlib.suppress(OSError):
                    found += (parent / name).lstat().st_size
        return found
