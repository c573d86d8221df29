"""Counts of what reading has cost this process, for the metrics."""

import threading
from collections import Counter
from collections.abc import Mapping


class ReadCounts:
    """`retries`, `requests` of object stores, `cache_hits` and `cache_misses` in blocks. Safe across
    threads."""

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

    def take(self) -> dict[str, int]:
        """All counts, which begin at 0 again: they are told to another process."""
        with self._lock:
            found, self._counts = dict(self._counts), Counter()
            return found


COUNTS = ReadCounts()
"""Of this process; what workers count is added when they answer."""
