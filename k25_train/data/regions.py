"""Memory that two processes share and use again: messages are written into it by one and read by the other.

A region is an anonymous file that both map. It belongs to a message until the receiver has dropped all of its
arrays, then it is written again: fresh memory would have to be cleared and mapped page by page, which takes
as long as copying it, and page-locked memory has to be registered, once.

Anonymous files need no room in /dev/shm and are gone when nobody holds them, however their holders end.
"""

import mmap
import os
import weakref
from collections import deque
from collections.abc import Callable
from typing import NamedTuple

import numpy as np

HEADROOM = 1.25
"""By how much a region is larger than what it is made for: batches differ in their pixels. Our choice."""
_PAGE_BYTES = 4096
PageLock = Callable[[np.ndarray], Callable[[], None]]
"""Page-locks memory [n] uint8, and gives what undoes it."""


class Region(NamedTuple):
    """A region as one end sees it."""

    number: int
    """The same on both ends."""
    memory: mmap.mmap
    """All of it."""


class Written:
    """The regions that this end writes."""

    def __init__(self) -> None:
        self._regions: dict[int, Region] = {}
        self._free: set[int] = set()
        self._num_made = 0
        self._descriptors: dict[int, int] = {}
        self._dropped: list[int] = []

    def take(self, num_bytes: int) -> Region:
        """A region of at least so many bytes, until it is freed."""
        fitting = [number for number in self._free if len(self._regions[number].memory) >= num_bytes]
        if fitting:
            number = min(fitting, key=lambda number: len(self._regions[number].memory))
            self._free.discard(number)
            return self._regions[number]
        # All free ones are too small, and would be for what comes next.
        for number in sorted(self._free):
            self._drop(number)
        self._free.clear()
        return self._make(num_bytes)

    def free(self, number: int) -> None:
        """Nobody uses a region any more."""
        self._free.add(number)

    def news_of(self, number: int) -> tuple[int | None, list[int]]:
        """For the other end: the descriptor of a region's file if it does not know it yet, for the caller to
        close, and the regions that it knows and that are given up."""
        dropped, self._dropped = self._dropped, []
        return self._descriptors.pop(number, None), dropped

    def _make(self, num_bytes: int) -> Region:
        size = -(-int(HEADROOM * num_bytes) // _PAGE_BYTES) * _PAGE_BYTES
        descriptor = os.memfd_create("k25-train data")
        os.ftruncate(descriptor, size)
        self._num_made += 1
        region = Region(self._num_made, mmap.mmap(descriptor, size))
        self._regions[region.number], self._descriptors[region.number] = region, descriptor
        return region

    def _drop(self, number: int) -> None:
        self._regions.pop(number).memory.close()
        descriptor = self._descriptors.pop(number, None)
        if descriptor is None:
            self._dropped.append(number)
        else:
            os.close(descriptor)


class Received:
    """The regions that the other end writes, mapped here."""

    def __init__(self) -> None:
        self._regions: dict[int, Region] = {}
        self._freed: deque[int] = deque()
        self.page_lock: PageLock = leave_pageable
        """Applied to each region once."""
        self._unpin: dict[int, Callable[[], None]] = {}

    def map(self, number: int, descriptor: int) -> None:
        """Map a region that is new."""
        size = os.fstat(descriptor).st_size
        region = Region(number, mmap.mmap(descriptor, size, mmap.MAP_SHARED | mmap.MAP_POPULATE))
        self._regions[number] = region
        self._unpin[number] = self.page_lock(np.frombuffer(region.memory, dtype=np.uint8))

    def drop(self, number: int) -> None:
        """Unmap a region that is not used any more."""
        self._unpin.pop(number)()
        self._regions.pop(number)

    def view(self, number: int, num_bytes: int) -> memoryview:
        """The start of a region; it is free when this and all arrays in it are gone."""
        array = np.frombuffer(self._regions[number].memory, dtype=np.uint8, count=num_bytes)
        weakref.finalize(array, self._freed.append, number).atexit = False
        return memoryview(array)

    def freed(self) -> list[int]:
        """The regions that became free since the last call."""
        return [self._freed.popleft() for _ in range(len(self._freed))]


def leave_pageable(memory: np.ndarray) -> Callable[[], None]:
    """Do nothing: the device is the CPU, or memory is not shared."""
    return lambda: None
