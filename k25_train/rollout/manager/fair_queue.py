"""Which rollout lives next: the least served source's, and of one source the oldest group's.

That is deficit round robin with equal quanta (Shreedhar and Varghese 1995), said without rounds: each source
counts what it was given, and the one that has the least goes first; between equals, the oldest group. A
source that was idle starts level with the others. One that was held back for lack of sandboxes may catch up,
but by `MOST_CREDIT` rollouts at most. A rollout counts 1 whatever its length: long ones that begin late are
what a step waits for.
"""

import heapq
from dataclasses import dataclass, field

MOST_CREDIT = 64
"""Rollouts by which a source that was held back may be given more than others, at a stretch. Our choice."""


@dataclass(slots=True)
class _Source[T]:
    """What waits of one source: `lanes[True]` needs a sandbox."""

    lanes: tuple[list[tuple[int, int, T]], list[tuple[int, int, T]]] = field(default_factory=lambda: ([], []))
    given: int = 0

    def head(self, sandboxes: int) -> tuple[int, int, int] | None:
        """Order and number of the next that may begin, and its lane."""
        found = [
            (lane[0][0], lane[0][1], which)
            for which, lane in enumerate(self.lanes)
            if lane and (which == 0 or sandboxes > 0)
        ]
        return min(found, default=None)

    def __len__(self) -> int:
        return len(self.lanes[0]) + len(self.lanes[1])


class FairQueue[T]:
    """Rollouts that wait to be admitted."""

    def __init__(self) -> None:
        self._sources: dict[str, _Source[T]] = {}
        self._number = self._clock = 0

    def __len__(self) -> int:
        return sum(map(len, self._sources.values()))

    def by_source(self) -> dict[str, int]:
        """Source -> how many wait."""
        return {name: len(source) for name, source in self._sources.items() if len(source)}

    def add(self, source: str, order: int, item: T, *, needs_sandbox: bool) -> None:
        """Have one wait. `order`: lower goes first, within its source; equals as they come."""
        entry = self._sources.setdefault(source, _Source())
        if not len(entry):
            # No credit for having had nothing to do.
            entry.given = max(entry.given, self._clock)
        self._number += 1
        heapq.heappush(entry.lanes[needs_sandbox], (order, self._number, item))

    def pop(self, sandboxes: int) -> T | None:
        """Take the next one out; None if there is none that may begin. `sandboxes`: that are free."""
        best: tuple[int, int, int] | None = None
        chosen, chosen_lane = None, 0
        for source in self._sources.values():
            if (head := source.head(sandboxes)) is not None:
                order, number, lane = head
                if best is None or (source.given, order, number) < best:
                    best, chosen, chosen_lane = (source.given, order, number), source, lane
        if chosen is None:
            return None
        self._clock = max(self._clock, chosen.given)
        chosen.given += 1
        for source in self._sources.values():
            source.given = max(source.given, self._clock - MOST_CREDIT)
        return heapq.heappop(chosen.lanes[chosen_lane])[2]
