"""Moments in the life of a rank at which something can happen to it: phases, and touches of files.

Runs in the rank itself; the product has no hook for it. Phases are those of the stall watchdog. Files are
seen by Python's audit events: those below the run folder that are opened for writing, renamed, removed,
linked or made.
"""

from __future__ import annotations

import os
import sys
import threading
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

_FILE_EVENTS = {
    "os.rename": "rename",
    "os.remove": "remove",
    "os.rmdir": "remove",
    "os.mkdir": "make",
    "os.link": "link",
    "os.symlink": "link",
    "os.truncate": "truncate",
    "shutil.rmtree": "remove",
}


@dataclass(frozen=True, slots=True, kw_only=True)
class Moment:
    """The n-th time that a rank does something."""

    rank: int
    name: str
    """What it does, such as `phase optimizer` or `file rename`."""
    count: int
    """How often it has done so, this time included."""

    def __str__(self) -> str:
        return f"rank {self.rank} at its {self.count}. {self.name}"


class Watch:
    """Counts moments in this process, and calls `reached` at one of them."""

    def __init__(self, moment: Moment | None, reached: Callable[[], None]) -> None:
        self.counts: Counter[str] = Counter()
        self._moment = moment
        self._reached = reached
        self._pid = os.getpid()
        self._is_busy = threading.local()

    def happened(self, name: str) -> None:
        """Count a moment of the rank itself: helpers that it forks inherit the watch, but not its moments."""
        if os.getpid() != self._pid or getattr(self._is_busy, "yes", False):
            return
        self.counts[name] += 1
        if self._moment and (self._moment.name, self._moment.count) == (name, self.counts[name]):
            self._is_busy.yes = True
            self._reached()
            self._is_busy.yes = False

    def install(self, run: Path) -> None:
        """Watch the phases, and the files below `run`."""
        from parallel.watchdog.phases import Phase

        enter = Phase.__enter__

        def entered(phase: Phase) -> None:
            enter(phase)
            self.happened(f"phase {phase.name}")

        Phase.__enter__ = entered  # type: ignore[method-assign]
        folder = os.fsencode(run)

        def audited(event: str, arguments: tuple[Any, ...]) -> None:
            name = _FILE_EVENTS.get(event) or ("write" if event == "open" and _writes(arguments) else "")
            if name and any(folder in path for path in map(_as_bytes, arguments[:2])):
                self.happened(f"file {name}")

        sys.addaudithook(audited)


def _writes(arguments: tuple[Any, ...]) -> bool:
    """Whether an `open` event is for writing."""
    flags = arguments[2]
    return isinstance(flags, int) and bool(flags & (os.O_WRONLY | os.O_RDWR))


def _as_bytes(argument: object) -> bytes:
    """A path as it was given; empty for what is none."""
    return os.fsencode(argument) if isinstance(argument, str | bytes | os.PathLike) else b""
