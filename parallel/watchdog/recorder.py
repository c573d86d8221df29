"""Keeps the phases of a rank, for a timeline of what it did.

These are spans of the host. On a GPU it submits most work and goes on, so that a pass looks short, and
whatever next waits for the device looks long: spans show where the host waits. Time on the device is for
Nsight Systems or torch.profiler to tell.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

from parallel.watchdog.states import ranks_text


class NamedPhase(Protocol):
    """What a recorder asks of a phase (`phases.py`)."""

    name: str

    def ranks(self) -> Sequence[int]:
        """The ranks that it communicates with."""


@dataclass(frozen=True, slots=True)
class Span:
    """One phase from begin to end."""

    name: str
    start_s: float
    """By the clock of the watch: ranks of one node share its origin."""
    end_s: float
    depth: int
    """Phases that were under way when it began."""
    peers: str
    """Ranks that it communicates with, as `ranks 0-3, 8`, for there may be thousands. Empty for none."""


class Recorder:
    """Collects the phases that begin and end while it is a watch's `recorder`."""

    def __init__(self) -> None:
        self.spans: list[Span] = []
        """In the order in which they ended."""
        self._begun: dict[NamedPhase, tuple[float, int]] = {}

    def begin(self, phase: NamedPhase, at_s: float, depth: int) -> None:
        """A phase begins."""
        self._begun[phase] = at_s, depth

    def end(self, phase: NamedPhase, at_s: float) -> None:
        """A phase ends; one that began before the recorder was attached is left out."""
        begun = self._begun.pop(phase, None)
        if begun is not None:
            start_s, depth = begun
            ranks = phase.ranks()
            self.spans.append(Span(phase.name, start_s, at_s, depth, ranks_text(ranks) if ranks else ""))
