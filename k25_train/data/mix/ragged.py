"""Lists of unequal length in one array: values end to end, and `offsets` where each list begins."""

import numpy as np


def offsets_of(counts: np.ndarray) -> np.ndarray:
    """[n + 1] int64: where each of n lists of `counts` values begins, and where the last one ends."""
    offsets = np.zeros(len(counts) + 1, dtype=np.int64)
    np.cumsum(counts, out=offsets[1:])
    return offsets


def positions_of(starts: np.ndarray, counts: np.ndarray) -> np.ndarray:
    """Positions of the values of lists that begin at `starts`, list after list: [sum of counts] int64."""
    offsets = offsets_of(counts)
    return np.arange(offsets[-1]) + np.repeat(starts.astype(np.int64) - offsets[:-1], counts)


def sums_of(values: np.ndarray, offsets: np.ndarray) -> np.ndarray:
    """[n] int64: sum of each list, 0 of an empty one."""
    totals = offsets_of(values)
    return totals[offsets[1:]] - totals[offsets[:-1]]
