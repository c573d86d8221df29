"""Counts what went wrong and was done again, by kind, until the row of the next step tells it."""

import time
from collections import Counter, defaultdict
from collections.abc import Iterator
from contextlib import contextmanager


class Counts:
    """Events and seconds since they were last taken. For the event loop's thread alone."""

    def __init__(self) -> None:
        self._events: Counter[str] = Counter()
        self._seconds: defaultdict[str, float] = defaultdict(float)
        self._running: Counter[str] = Counter()
        self._since: dict[str, float] = {}

    def add(self, name: str) -> None:
        """Something happened once more."""
        self._events[name] += 1

    @contextmanager
    def during(self, name: str) -> Iterator[None]:
        """Within: seconds count under a name, once however many are within at the same time."""
        if not self._running[name]:
            self._since[name] = time.perf_counter()
        self._running[name] += 1
        try:
            yield
        finally:
            self._running[name] -= 1
            if not self._running[name]:
                self._seconds[name] += time.perf_counter() - self._since[name]

    def take(self) -> dict[str, float]:
        """Events as they were named, seconds as `NAME_s`; counting starts over."""
        now = time.perf_counter()
        for name, running in self._running.items():
            if running:
                self._seconds[name] += now - self._since[name]
                self._since[name] = now
        found: dict[str, float] = dict(self._events)
        found |= {f"{name}_s": round(seconds, 6) for name, seconds in self._seconds.items()}
        self._events, self._seconds = Counter(), defaultdict(float)
        return found
