"""How ranks end, as the torchrun of their node sees it: a line for each in a file of the attempt's folder.

torchrun itself keeps neither the order of ends nor which of them it brought about, and takes status 0 for
success whenever it comes. The file has a line for the node, one per rank, and what its kernel said meanwhile.
"""

import contextlib
import itertools
import json
import os
import socket
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, Protocol

from k25_train import farewell
from launch import kernel_log
from launch.blame.evidence import LEFT_EARLY

PREFIX, SUFFIX = "ends_", ".jsonl"


class Log(Protocol):
    """Where lines go."""

    def add(self, **line: object) -> None:
        """Keep a line."""


class NoLog:
    """Ranks that were started by hand: nobody would read it."""

    def add(self, **line: object) -> None:
        """Keep nothing."""


class EndsLog:
    """The file of a node. A line that cannot be written is lost: the ranks are more important."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def add(self, **line: object) -> None:
        """Append a line, at once."""
        with contextlib.suppress(OSError), self.path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(line) + "\n")


def log_of(folder: Path, node: str) -> Path:
    """The file of a node in the attempt's folder."""
    return folder / f"{PREFIX}{node}{SUFFIX}"


def lines_in(folder: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    """Node and line, of every whole line in the files of an attempt's folder."""
    for path in sorted(folder.glob(f"{PREFIX}*{SUFFIX}")):
        try:
            text = path.read_text(encoding="utf-8", errors="replace")
        except OSError:
            continue
        for line in text.splitlines():
            with contextlib.suppress(ValueError):
                found = json.loads(line)
                if isinstance(found, dict):
                    yield path.name.removeprefix(PREFIX).removesuffix(SUFFIX), found


class RankWatch:
    """Notes how the ranks of a node end, in the order in which they do."""

    def __init__(self, log: Log) -> None:
        self.log = log
        self._noted: set[int] = set()
        self._started_s = time.clock_gettime(time.CLOCK_BOOTTIME)

    def begin(self, error_files: Mapping[int, str]) -> None:
        """Before ranks start: mark each as running, and note the node's addresses."""
        for error_file in error_files.values():
            # Without the mark, status 0 counts as success, as it did.
            with contextlib.suppress(OSError):
                Path(error_file).with_name(farewell.RUNNING).touch()
        self.log.add(event="begin", addresses=own_addresses())

    def note(self, rank: int, pid: int, status: int, error_file: str, *, is_closing: bool) -> int:
        """Note the end of a rank, once; returns the status that counts.

        Args:
            rank: its global rank.
            pid: its process.
            status: its exit status, or minus a signal's number.
            error_file: where it was to write its error.
            is_closing: whether torchrun was ending its ranks by then.
        """
        # A rank that removed the mark was done.
        if status == 0 and Path(error_file).with_name(farewell.RUNNING).exists() and not is_closing:
            status = LEFT_EARLY
        if rank not in self._noted:
            self._noted.add(rank)
            self.log.add(
                event="end", rank=rank, pid=pid, status=status, at_s=time.time(), is_closing=is_closing,
                error=error_in(error_file),
            )  # fmt: skip
        return status

    def end(self) -> None:
        """After all ranks have ended: note what the kernel said since they started."""
        try:
            found = list(kernel_log.lines_since(self._started_s))
        except OSError as error:
            self.log.add(event="kernel", skipped=f"{kernel_log.KMSG}: {error.strerror}", lines=[])
            return
        lines = [
            {"kind": line.kind, "text": line.text, "pid": line.pid}
            for line in found[: kernel_log.MAX_MESSAGES]
        ]
        self.log.add(event="kernel", skipped="", lines=lines)


def error_in(error_file: str) -> dict[str, Any] | None:
    """What a rank said of its error; None if it said nothing."""
    try:
        details = json.loads(Path(error_file).read_text(encoding="utf-8")).get(farewell.DETAILS)
    except (OSError, ValueError, AttributeError):
        return None
    return details if isinstance(details, dict) else None


def own_addresses() -> list[str]:
    """Addresses and names by which this node's peers may know it."""
    name = socket.gethostname()
    found = {os.environ.get("SLURMD_NODENAME", name), name}
    with contextlib.suppress(OSError):
        text = Path("/proc/net/fib_trie").read_text(encoding="ascii")
        lines = text.splitlines()
        found |= {
            line.split()[-1] for line, below in itertools.pairwise(lines)
            if "|--" in line and "/32 host LOCAL" in below
        }  # fmt: skip
    with contextlib.suppress(OSError):
        for line in Path("/proc/net/if_inet6").read_text(encoding="ascii").splitlines():
            found.add(socket.inet_ntop(socket.AF_INET6, bytes.fromhex(line.split()[0])))
    return sorted(found)
