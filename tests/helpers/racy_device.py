"""A device of plain memory in which what is used too early, or too late, is seen.

Freed memory is overwritten and handed out again at once. Copies hold no memory, as those of a GPU do not, and
each has its memory for itself while it lasts: two that meet in a piece of memory, one of them writing, are
noted as a race, and so is memory that is freed under a copy.
"""

import random
import threading
import weakref
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from parallel.host.copier import Event, ThreadCopier

POISON = 0xAB


class Range(NamedTuple):
    """Addresses that somebody reads or writes."""

    start: int
    end: int
    is_written: bool

    @classmethod
    def of(cls, tensor: Tensor, *, is_written: bool) -> "Range":
        return cls(tensor.data_ptr(), tensor.data_ptr() + tensor.nbytes, is_written)

    def meets(self, other: "Range") -> bool:
        overlap = self.start < other.end and other.start < self.end
        return overlap and (self.is_written or other.is_written)


class RacyDevice:
    """Memory of a device, and who is at work in it."""

    def __init__(self, num_bytes: int, seed: int) -> None:
        self._memory = np.full(num_bytes, POISON, np.uint8)
        self._flat = torch.from_numpy(self._memory)
        self._used: list[tuple[int, int]] = []
        self._active: list[Range] = []
        self._lock = threading.RLock()
        self._random = np.random.default_rng(seed)
        self.races: list[str] = []

    @property
    def used_bytes(self) -> int:
        """Memory that is held."""
        with self._lock:
            return sum(end - start for start, end in self._used)

    def empty(self, shape: Sequence[int], stride: Sequence[int], dtype: torch.dtype) -> Tensor:
        """New memory at the lowest free address, full of poison; it is free once no tensor holds it."""
        num_bytes = max(1, torch.empty_strided(shape, stride, dtype=dtype, device="meta").nbytes)
        with self._lock:
            start = 0
            for used_start, used_end in sorted(self._used):
                if start + num_bytes <= used_start:
                    break
                start = -(-used_end // 16) * 16
            piece = self._memory[start : start + num_bytes]
            assert piece.nbytes == num_bytes, "the device of this test is full"
            self._used.append((start, start + num_bytes))
        tensor = torch.from_numpy(piece).view(dtype).as_strided(shape, stride)
        weakref.finalize(piece, self._free, start, start + num_bytes)
        return tensor

    def draw(self, shape: Sequence[int], stride: Sequence[int], dtype: torch.dtype) -> Tensor:
        """New memory of random bytes."""
        tensor = self.empty(shape, stride, dtype)
        values = torch.frombuffer(bytearray(self._random.bytes(tensor.nbytes)), dtype=dtype)
        return tensor.copy_(values.as_strided(shape, stride))

    def without_hold(self, tensor: Tensor) -> Tensor:
        """A tensor's memory, not kept by whoever has this."""
        start = tensor.data_ptr() - self._flat.data_ptr()
        flat = self._flat[start : start + tensor.nbytes].view(tensor.dtype)
        return flat.as_strided(tensor.shape, tensor.stride())

    @contextmanager
    def at_work(self, *ranges: Range) -> Iterator[None]:
        """Note a race with whoever else is at work there, or frees memory of it, meanwhile."""
        with self._lock:
            self.races += [
                f"{one} and {other}" for one in ranges for other in self._active if one.meets(other)
            ]
            self._active += ranges
        yield
        with self._lock:
            for each in ranges:
                self._active.remove(each)

    def _free(self, start: int, end: int) -> None:
        with self._lock:
            freed = Range(start + self._flat.data_ptr(), end + self._flat.data_ptr(), True)
            self.races += [f"{other} is freed" for other in self._active if freed.meets(other)]
            self._memory[start:end] = POISON
            self._used.remove((start, end))


class RacyCopier(ThreadCopier):
    """Copies of a racy device."""

    def __init__(self, device: RacyDevice, delay_s: Callable[[], float]) -> None:
        super().__init__(delay_s, timeout_s=60.0)
        self.memory = device

    def empty(self, shape: Sequence[int], stride: Sequence[int], dtype: torch.dtype) -> Tensor:
        return self.memory.empty(shape, stride, dtype)

    def to_host(self, device: Tensor, host: Tensor) -> Event:
        return super().to_host(self.memory.without_hold(device), host)

    def to_device(self, host: Tensor, device: Tensor) -> Event:
        return super().to_device(host, self.memory.without_hold(device))

    def _copy(self, source: Tensor, target: Tensor, delay_s: float) -> None:
        with self.memory.at_work(Range.of(source, is_written=False), Range.of(target, is_written=True)):
            super()._copy(source, target, delay_s)


def random_delays(seed: int) -> Callable[[], float]:
    """Mostly microseconds, seldom milliseconds."""
    source = random.Random(seed)
    return lambda: source.uniform(0, 3e-3 if source.random() < 0.03 else 2e-4)
