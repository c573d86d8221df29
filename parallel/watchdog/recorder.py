"""Keeps the phases of a rank, for a timeline of what it did.

These are spans of the host. On a GPU it submits most work and continues, so that a pass looks short, and
whatever next waits for the device looks long: spans show where the host waits. Time on the device is in the
profiles of the same step (`k25_train/training/device_trace.py`).
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

from parallel.watchdog.states import ranks_text


class NamedPhase(Protocol):
    """What a recorder needs of a phase (`phases.py`)."""

    name: str

    def ranks(self) -> Sequence[int]:
        """The ranks that it communicates with."""


@dataclass(frozen=True, slots=True)
class Span:
    """One completed phase."""

    name: str
    start_s: float
    """Start by the tracker's clock, whose origin the ranks of a node share."""
    end_s: float
    """End by the same clock."""
    depth: int
    """Number of phases that the rank was in already."""
    peers: str
    """Ranks that the phase communicated with, as `ranks 0-3, 8`, for there may be thousands; "" for none."""


class Recorder:
    """Collects the phases that begin and end while it is a tracker's `recorder`."""

    def __init__(self) -> None:
        self.spans: list[Span] = []
        """Completed phases, in the order of their ends."""
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
