"""Ranges of flattened tensors, and where those that are wanted lie in those that are stored.

All tensors are laid end to end on one line, so that a range of any of them is one range of the line, and
millions of ranges are searched with one `searchsorted`. 1e13 elements are far from the end of an int64.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Self

import numpy as np
from numpy.typing import NDArray

Numbers = NDArray[np.int64]


class CoverageError(ValueError):
    """Elements that are missing, or there twice."""


@dataclass(frozen=True, slots=True)
class Ranges:
    """Ranges of elements, each of one tensor. An entry per range."""

    tensor: NDArray[np.int32]
    """Which tensor."""
    start: Numbers
    """First element of the flattened tensor."""
    stop: Numbers
    """One after the last."""

    @classmethod
    def of(cls, rows: Iterable[tuple[int, int, int]]) -> Self:
        """From (tensor, start, stop) each."""
        columns = np.array(list(rows), dtype=np.int64).reshape(-1, 3).T
        return cls(columns[0].astype(np.int32), columns[1].copy(), columns[2].copy())

    def __len__(self) -> int:
        return len(self.tensor)

    @property
    def numel(self) -> Numbers:
        """Elements of each."""
        return self.stop - self.start

    def take(self, which: NDArray[np.intp]) -> "Ranges":
        """Some of them, in a given order."""
        return Ranges(self.tensor[which], self.start[which], self.stop[which])

    def on_line(self, numels: Numbers) -> tuple[Numbers, Numbers]:
        """Start and stop of each when all tensors, of `numels` elements each, are laid end to end."""
        base = np.concatenate([[0], np.cumsum(numels, dtype=np.int64)])[self.tensor]
        return base + self.start, base + self.stop


@dataclass(frozen=True, slots=True)
class Overlaps:
    """What lies both in a wanted and in a stored range. An entry each, by wanted range, then by start."""

    wanted: NDArray[np.intp]
    """Which wanted range."""
    stored: NDArray[np.intp]
    """Which stored range."""
    ranges: Ranges
    """The elements in both."""

    def __len__(self) -> int:
        return len(self.wanted)


def overlaps(wanted: Ranges, stored: Ranges, numels: Numbers, names: Sequence[str]) -> Overlaps:
    """Where every element of the wanted ranges is stored.

    Args:
        wanted: in any order; they may overlap and repeat.
        stored: sorted by tensor and start, without overlap (`check_covered`).
        numels: elements per tensor.
        names: of the tensors.

    Raises CoverageError naming a tensor of which something wanted is not stored.
    """
    _check_within(wanted, numels, names)
    first, last = wanted.on_line(numels)
    stored_first, stored_last = stored.on_line(numels)
    # Empty ranges would split the ones around them in the search.
    full = np.flatnonzero(stored_last > stored_first)
    stored_first, stored_last = stored_first[full], stored_last[full]
    low = np.searchsorted(stored_last, first, side="right")
    high = np.maximum(np.searchsorted(stored_first, last, side="left"), low)
    counts = np.where(last > first, high - low, 0)
    # Row by row: the wanted range, and low, low + 1, … up to high.
    which = np.repeat(np.arange(len(wanted)), counts)
    found = np.arange(counts.sum()) - np.repeat(np.cumsum(counts) - counts, counts) + low[which]
    starts = np.maximum(first[which], stored_first[found])
    stops = np.minimum(last[which], stored_last[found])
    _check_found(wanted, np.bincount(which, stops - starts, minlength=len(wanted)), names)
    base = (first - wanted.start)[which]
    ranges = Ranges(wanted.tensor[which], starts - base, stops - base)
    return Overlaps(which, full[found], ranges)


def check_covered(ranges: Ranges, numels: Numbers, names: Sequence[str]) -> None:
    """Raise CoverageError unless the ranges, in any order, hold every element of every tensor exactly once.

    It names the tensor, and the elements that are missing or there twice.
    """
    _check_within(ranges, numels, names)
    first, last = ranges.on_line(numels)
    full = np.flatnonzero(last > first)
    order = full[np.argsort(first[full], kind="stable")]
    starts = np.append(first[order], np.sum(numels, dtype=np.int64))
    ends = np.concatenate([[0], last[order]])
    wrong = np.flatnonzero(starts != ends)
    if len(wrong):
        low, high = sorted((int(starts[wrong[0]]), int(ends[wrong[0]])))
        what = "missing" if starts[wrong[0]] > ends[wrong[0]] else "there twice"
        base = np.cumsum(numels, dtype=np.int64) - numels
        tensor = int(np.searchsorted(base, low, side="right")) - 1
        high = min(high, int(base[tensor] + numels[tensor]))
        raise CoverageError(
            f"{names[tensor]}: elements {low - base[tensor]} to {high - base[tensor]} are {what}"
        )


def _check_within(ranges: Ranges, numels: Numbers, names: Sequence[str]) -> None:
    outside = (ranges.start < 0) | (ranges.stop < ranges.start) | (ranges.stop > numels[ranges.tensor])
    if outside.any():
        bad = int(np.argmax(outside))
        tensor = ranges.tensor[bad]
        found = f"elements {ranges.start[bad]} to {ranges.stop[bad]}"
        raise CoverageError(f"{names[tensor]}: {found} are not within its {numels[tensor]}")


def _check_found(wanted: Ranges, found: NDArray[np.float64], names: Sequence[str]) -> None:
    """`found` has the elements of each wanted range that are stored."""
    missing = np.flatnonzero(found.astype(np.int64) != wanted.numel)
    if len(missing):
        bad = missing[0]
        raise CoverageError(
            f"{names[wanted.tensor[bad]]}: of elements {wanted.start[bad]} to {wanted.stop[bad]} only "
            f"{int(found[bad])} are stored"
        )
