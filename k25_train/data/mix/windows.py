"""The order in which a source's items are drawn: window after window, each of them computed, none stored.

An epoch permutes blocks of `BLOCK_ITEMS` consecutive items; some hundred blocks make a window, in which the
items are permuted. A source of up to about `WINDOW_ITEMS` is one window, hence fully shuffled. Any window of
any epoch is found at once, however many items there are, and reads its part of the index in runs of a block.
"""

from dataclasses import dataclass
from functools import lru_cache

import numpy as np

from k25_train.data.mix.permutation import KeyedPermutation, key_of, shuffled
from k25_train.data.mix.ragged import positions_of

BLOCK_ITEMS = 256
"""Consecutive items that stay in the same window: their columns are on one page of the index. Our choice."""
WINDOW_ITEMS = 16_384
"""Items of a window, about. More mix and pack better and take longer to resume. Our choice."""


@dataclass(frozen=True, slots=True)
class Selection:
    """Which of a source's items are trained on: all but every n-th, which are held out."""

    num_items: int
    """Items of the source."""
    num_heldout: int
    """Of them held out of training, evenly spread; at most half."""

    @property
    def num_training(self) -> int:
        """Items that are trained on."""
        return self.num_items - self.num_heldout

    @property
    def _stride(self) -> int:
        return self.num_items // max(self.num_heldout, 1)

    def training(self, positions: np.ndarray) -> np.ndarray:
        """Items at positions [0, num_training): [k] int64 to the same."""
        if not self.num_heldout:
            return positions
        # One of `stride` is passed over, until all that are held out have been.
        return positions + np.minimum(positions // (self._stride - 1) + 1, self.num_heldout)

    def heldout(self, positions: np.ndarray) -> np.ndarray:
        """Items at positions [0, num_heldout): [k] int64 to the same."""
        return positions * self._stride


class Windows:
    """The windows of one source, epoch after epoch."""

    def __init__(self, num_items: int, seed: int, source: str, *, shuffle: bool) -> None:
        """`num_items` (1 or more) are those trained on; `source` is its name, so that equal seeds do not
        shuffle two sources alike. Without `shuffle` items come in the order of the index."""
        self.num_items = num_items
        self._seed = seed
        self._source = source
        self.shuffle = shuffle
        self._num_blocks = -(-num_items // BLOCK_ITEMS)
        # Evenly large: a last one of few items would be packed with much padding.
        self.num_windows = max(1, round(num_items / WINDOW_ITEMS))
        self._blocks_of = lru_cache(maxsize=2)(
            lambda epoch: KeyedPermutation(self._num_blocks, key_of(seed, source, epoch, "blocks"))
        )

    def key(self, epoch: int, window: int, purpose: str) -> int:
        """What an order within a window of an epoch depends on."""
        return key_of(self._seed, self._source, epoch, window, purpose)

    def items(self, epoch: int, window: int) -> np.ndarray:
        """Positions [k] int64 in [0, num_items) of a window's items, in their order."""
        # 1. Its blocks. The last block of the source may be shorter.
        first, end = (self._num_blocks * number // self.num_windows for number in (window, window + 1))
        blocks = np.arange(first, end)
        if self.shuffle and self.num_windows > 1:
            blocks = self._blocks_of(epoch)(blocks)
        begins = blocks * BLOCK_ITEMS
        items = positions_of(begins, np.minimum(begins + BLOCK_ITEMS, self.num_items) - begins)

        # 2. Their items.
        return items[self.order(len(items), epoch, window, "items")]

    def order(self, count: int, epoch: int, window: int, purpose: str) -> np.ndarray:
        """[count] int64: the order of what a window has `count` of; as they come without shuffling."""
        return shuffled(count, self.key(epoch, window, purpose)) if self.shuffle else np.arange(count)
