"""What is asked of storage for the parts of files that are wanted: whole blocks, merged, each once.

A checksum is of a block, so a range costs the blocks that it touches. Large ranges are read in chunks, so
that the staging memory is bounded; small ones that lie close together are read at once.
"""

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

Numbers = NDArray[np.int64]


@dataclass(frozen=True, slots=True)
class Slices:
    """Bytes that are wanted, each of one entry of a file. An entry each."""

    file: NDArray[np.int32]
    """Which file."""
    start: Numbers
    """First byte in the file."""
    stop: Numbers
    """One after the last."""
    entry_start: Numbers
    """First byte of the entry, which its blocks are counted from."""
    entry_stop: Numbers
    """One after its last byte, where its last block ends."""

    def __len__(self) -> int:
        return len(self.file)

    def take(self, which: NDArray[np.intp]) -> "Slices":
        """Some of them, in a given order."""
        return Slices(
            self.file[which],
            self.start[which],
            self.stop[which],
            self.entry_start[which],
            self.entry_stop[which],
        )

    def in_blocks(self, block_bytes: int) -> tuple[Numbers, Numbers]:
        """Start and stop of the blocks that each touches."""
        low = (self.start - self.entry_start) // block_bytes * block_bytes + self.entry_start
        high = -((self.entry_start - self.stop) // block_bytes) * block_bytes + self.entry_start
        return low, np.minimum(high, self.entry_stop)


@dataclass(frozen=True, slots=True)
class ReadPlan:
    """Reads, by file and place, and which slices each serves."""

    file: NDArray[np.int32]
    """Per read: which file."""
    start: Numbers
    """Per read: first byte."""
    stop: Numbers
    """Per read: one after the last; at most two chunks long."""
    first_slice: Numbers
    """Per read, and the end: its slices are `first_slice[i]` to `first_slice[i + 1]`."""
    slices: Slices
    """What the wanted slices became when the long ones were cut, in order of the reads."""
    origin: NDArray[np.intp]
    """Per slice: which of the wanted ones it is of."""

    def __len__(self) -> int:
        return len(self.file)

    @property
    def num_bytes(self) -> int:
        """Bytes that are asked of storage for data."""
        return int(np.sum(self.stop - self.start))

    @property
    def files(self) -> NDArray[np.int32]:
        """Files that are touched; each costs its table of checksums as well."""
        return np.unique(self.file)


def plan_reads(wanted: Slices, *, block_bytes: int, chunk_bytes: int, gap_bytes: int) -> ReadPlan:
    """Reads that serve all wanted slices, in any order, none of them empty.

    Args:
        wanted: bytes of entries.
        block_bytes: what a checksum is of.
        chunk_bytes: a multiple of that; longer slices are cut. A read has at most twice as many.
        gap_bytes: what is read in vain rather than by another request.
    """
    slices, origin = _cut(wanted, chunk_bytes)
    low, high = slices.in_blocks(block_bytes)
    order = np.lexsort((high, low, slices.file))
    slices, origin, low, high = slices.take(order), origin[order], low[order], high[order]
    if not len(slices):
        return ReadPlan(slices.file, low, high, np.zeros(1, np.int64), slices, origin)

    # A run is what lies close together. Its reads begin where its next chunk does and nothing is cut in two:
    # slices that overlap, or share a block, go together, and at the chunks of an entry all of them end.
    reach = _reach(slices.file, high)
    is_other = slices.file[1:] != slices.file[:-1]
    is_apart = np.append(True, is_other | (low[1:] > reach[:-1] + gap_bytes))
    is_free = np.append(True, is_other | (low[1:] >= reach[:-1]))
    run_start, start = (low[np.flatnonzero(each)][np.cumsum(each) - 1] for each in (is_apart, is_free))
    chunk = (start - run_start) // chunk_bytes
    firsts = np.flatnonzero(is_apart | np.append(True, chunk[1:] != chunk[:-1]))
    return ReadPlan(
        file=slices.file[firsts],
        start=low[firsts],
        stop=np.maximum.reduceat(high, firsts),
        first_slice=np.append(firsts, len(slices)),
        slices=slices,
        origin=origin,
    )


def _cut(wanted: Slices, chunk_bytes: int) -> tuple[Slices, NDArray[np.intp]]:
    """Cut slices where a chunk of their entry ends."""
    first = (wanted.start - wanted.entry_start) // chunk_bytes
    count = (wanted.stop - wanted.entry_start - 1) // chunk_bytes - first + 1
    origin = np.repeat(np.arange(len(wanted)), count)
    number = np.arange(len(origin)) - np.repeat(np.cumsum(count) - count, count) + first[origin]
    cut = wanted.take(origin)
    start = cut.entry_start + number * chunk_bytes
    return (
        Slices(
            cut.file,
            np.maximum(cut.start, start),
            np.minimum(cut.stop, start + chunk_bytes),
            cut.entry_start,
            cut.entry_stop,
        ),
        origin,
    )


def _reach(file: NDArray[np.int32], high: Numbers) -> Numbers:
    """How far all slices up to each reach in its file. Sorted by file."""
    # Files one after the other on a line, so that one running maximum does.
    span = np.int64(high.max() + 1)
    return np.maximum.accumulate(high + file * span) - file * span
