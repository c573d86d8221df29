"""Which source each sequence of the training stream comes from: shares are of tokens. Pure.

Every source has a clock: the tokens that it has served by its weight. A sequence is due when the clock of
its source passes the middle of it, and sequences come in the order in which they are due. So each is
never off its share by much more than half a sequence, whatever its padding, and one that ends leaves its
share to the others. A merge is itself a feed that can be merged: text sources among themselves, vision
sources among themselves, then the two.

Invariants:
- the order is a function of the tokens served before and of the sequences to come, not of how many of these
  are looked at ahead;
- sequences of a source keep their order, and none is left out;
- while none ends, the clocks of any two differ by less than the sum of half a sequence of each.

How K2.5 mixes sources is not disclosed beyond a constant ratio of vision (section 4.1); this is our choice.
"""

from collections.abc import Sequence
from math import inf
from typing import Protocol

import numpy as np


class Feed(Protocol):
    """Sequences to come, of one source or several."""

    def more(self) -> np.ndarray | None:
        """[k] int64: tokens of the next k > 0 sequences, behind those told before; None if there are none."""

    def take(self, count: int) -> np.ndarray:
        """[count] int64: the sources of the next sequences, which are told already and are served by this."""


class DryError(Exception):
    """A feed that must not end has ended, and its next sequence would be due."""

    def __init__(self, feed: int) -> None:
        """`feed`: its position in the merge."""
        super().__init__(feed)
        self.feed = feed


class Merge:
    """Feeds merged by tokens served / weight; itself a feed."""

    def __init__(
        self, feeds: Sequence[Feed], weights: Sequence[float], served: Sequence[int], *, may_end: bool
    ) -> None:
        """
        Args:
            feeds: of equal clocks the first comes first.
            weights: of each, positive.
            served: tokens that each has served since these weights hold.
            may_end: whether the others go on when one of them ends; otherwise `more` raises `DryError`.
        """
        self._feeds = feeds
        self._weights = weights
        self._may_end = may_end
        # Of each feed: tokens told so far, the clocks of sequences that are not merged yet, and their tokens.
        self._told = list(served)
        self._clocks = [np.zeros(0) for _ in feeds]
        self._tokens = [np.zeros(0, dtype=np.int64) for _ in feeds]
        self._has_ended = [False] * len(feeds)
        # Feeds of the sequences that are merged and not taken.
        self._order = np.zeros(0, dtype=np.int64)

    @property
    def num_ready(self) -> int:
        """Sequences that are told and not taken."""
        return len(self._order)

    def more(self) -> np.ndarray | None:
        """See `Feed`. Raises `DryError`."""
        while not all(self._has_ended) or any(map(len, self._clocks)):
            horizons = [self._horizon(feed) for feed in range(len(self._feeds))]
            earliest = min(range(len(self._feeds)), key=horizons.__getitem__)
            if horizons[earliest] < inf:
                self._hear(earliest)
            # What is told later is due later than this.
            merged = self._merge_before(min(map(self._horizon, range(len(self._feeds)))))
            if len(merged):
                return merged
        return None

    def take(self, count: int) -> np.ndarray:
        """See `Feed`."""
        taken, self._order = self._order[:count], self._order[count:]
        sources = np.empty(len(taken), dtype=np.int64)
        for number, feed in enumerate(self._feeds):
            own = np.flatnonzero(taken == number)
            if len(own):
                sources[own] = feed.take(len(own))
        return sources

    def _horizon(self, feed: int) -> float:
        """Before this nothing of a feed is due that has not been told."""
        ends = self._has_ended[feed] and self._may_end
        return inf if ends else self._told[feed] / self._weights[feed]

    def _hear(self, feed: int) -> None:
        tokens = None if self._has_ended[feed] else self._feeds[feed].more()
        if tokens is None:
            if not self._may_end:
                raise DryError(feed)
            self._has_ended[feed] = True
            return
        ends = self._told[feed] + np.cumsum(tokens)
        self._clocks[feed] = np.concatenate([self._clocks[feed], (ends - tokens / 2) / self._weights[feed]])
        self._tokens[feed] = np.concatenate([self._tokens[feed], tokens])
        self._told[feed] = int(ends[-1])

    def _merge_before(self, clock: float) -> np.ndarray:
        """Merge what is due before; its tokens."""
        counts = [int(np.searchsorted(clocks, clock)) for clocks in self._clocks]
        due = np.concatenate([clocks[:count] for clocks, count in zip(self._clocks, counts, strict=True)])
        tokens = np.concatenate([own[:count] for own, count in zip(self._tokens, counts, strict=True)])
        feeds = np.repeat(np.arange(len(counts)), counts)
        order = np.argsort(due, kind="stable")
        self._order = np.concatenate([self._order, feeds[order]])
        for feed, count in enumerate(counts):
            self._clocks[feed], self._tokens[feed] = self._clocks[feed][count:], self._tokens[feed][count:]
        return tokens[order]
