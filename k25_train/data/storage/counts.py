"""Counts of what reading has cost this process, for the metrics."""

import threading
from collections import Counter
from collections.abc import Collection, Mapping

COSTS = ("retries", "requests", "cache_hits", "cache_misses")
"""What reading has cost: `requests` of object stores, and the cache in blocks."""
PIXELS = "pixels"
"""Pixels that were decoded and handed on, those of padding to whole patches included."""


class ReadCounts:
    """`COSTS` and `PIXELS`. Safe across threads."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._counts: Counter[str] = Counter()

    def add(self, name: str, count: int = 1) -> None:
        """Count something."""
        with self._lock:
            self._counts[name] += count

    def add_all(self, counts: Mapping[str, int]) -> None:
        """Count what another process has."""
        with self._lock:
            self._counts.update(counts)

    def so_far(self) -> dict[str, int]:
        """All counts."""
        with self._lock:
            return dict(self._counts)

    def take(self, names: Collection[str] = (*COSTS, PIXELS)) -> dict[str, int]:
        """The counts of these names, which begin at 0 again: they are told to somebody else."""
        with self._lock:
            return {name: self._counts.pop(name) for name in names if name in self._counts}


COUNTS = ReadCounts()
"""Of this process; what workers count is added when they answer."""
