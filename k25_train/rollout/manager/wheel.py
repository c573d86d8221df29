"""When to look at what: one wheel for the deadlines and the silence of all rollouts, instead of timers.

    bucket = due time // tick        looked at once its tick is over

An entry is in one bucket. Progress does not move it: whoever looks at it finds that it is not due yet, and
puts it back, once in `stuck_s` at most. Times are seconds of one clock.
"""

from collections.abc import Hashable

NOWHERE = -1
"""Bucket of what is in none."""


class Wheel[T: Hashable]:
    """Entries by when they are due."""

    def __init__(self, tick_s: float) -> None:
        """`tick_s`: seconds of a bucket: how late an entry may be looked at."""
        self.tick_s = tick_s
        """Seconds of a bucket."""
        self._buckets: dict[int, set[T]] = {}
        self._looked = NOWHERE

    def __len__(self) -> int:
        return sum(map(len, self._buckets.values()))

    def put(self, entry: T, due: float) -> int:
        """Put an entry in that is in no bucket; the number of its bucket, which `remove` needs."""
        # What is due already is looked at next.
        bucket = max(int(due // self.tick_s) + 1, self._looked + 1)
        self._buckets.setdefault(bucket, set()).add(entry)
        return bucket

    def remove(self, entry: T, bucket: int) -> None:
        """Take an entry out; nothing happens if it is not there."""
        if (entries := self._buckets.get(bucket)) is not None:
            entries.discard(entry)
            if not entries:
                del self._buckets[bucket]

    def due(self, now: float) -> list[T]:
        """Take out all that are due."""
        last = int(now // self.tick_s)
        first = min(self._buckets, default=last + 1) if self._looked == NOWHERE else self._looked + 1
        self._looked = max(last, self._looked)
        if last - first > len(self._buckets):
            numbers = sorted(number for number in self._buckets if number <= last)
        else:
            numbers = [number for number in range(first, last + 1) if number in self._buckets]
        return [entry for number in numbers for entry in self._buckets.pop(number)]
