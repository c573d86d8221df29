"""Who reads what of items that several ranks hold alike: each an even share, which it sends to the others."""

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

Numbers = NDArray[np.int64]


@dataclass(frozen=True, slots=True)
class Shares:
    """Ranges of items, by replica, then by item. An entry each; none is empty."""

    replica: NDArray[np.int32]
    """Which replica has it."""
    item: NDArray[np.int32]
    """Of which item."""
    start: Numbers
    """First element of the item."""
    stop: Numbers
    """One after the last."""

    def of(self, replica: int) -> "Shares":
        """Those of one replica."""
        which = np.flatnonzero(self.replica == replica)
        return Shares(self.replica[which], self.item[which], self.start[which], self.stop[which])


def share_out(numels: Numbers, num_replicas: int, *, multiple: int = 1) -> Shares:
    """Cut items among replicas, evenly to `multiple` elements: every element is in exactly one share.

    The items are laid end to end and the line is cut into as many pieces as there are replicas: fewer items
    than these are cut, and every replica can compute all shares by itself.

    Args:
        numels: elements per item.
        num_replicas: ranks that hold all the items alike.
        multiple: where the line may be cut.
    """
    ends = np.cumsum(numels, dtype=np.int64)
    total = int(ends[-1]) if len(ends) else 0
    num_units = -(-total // multiple)
    cuts = np.arange(1, num_replicas, dtype=np.int64) * num_units // num_replicas * multiple
    points = np.unique(np.concatenate([[0], np.minimum(cuts, total), ends]))
    first, last = points[:-1], points[1:]
    item = np.searchsorted(ends, first, side="right").astype(np.int32)
    base = (ends - numels)[item] if len(ends) else ends
    replica = np.searchsorted(cuts, first, side="right").astype(np.int32)
    return Shares(replica, item, first - base, last - base)
