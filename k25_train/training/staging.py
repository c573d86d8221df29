"""Page-locked memory for what goes to the device in a step: allocated once and used again.

A GPU copies from such memory while it computes. Allocating it may wait for kernels that run, those of NCCL
included, which may wait for other ranks. So what the reading process sends lies in memory that is
page-locked once (`data/regions.py`) and is held here until it is copied; anything else is copied into a ring
of two slots, each for one step, that only grow.
"""

from collections.abc import Callable, Sequence
from typing import Protocol

import numpy as np
import torch
from torch import Tensor

from k25_train.errors import MachineError

NUM_SLOTS = 2
"""While a step copies from one slot, the next step's inputs go to the other."""
HEADROOM = 1.25
"""By how much a slot is larger than what it has to hold: batches differ in their pixels. Our choice."""
_ALIGNMENT = 64


class Event(Protocol):
    """A point in the device's work."""

    def record(self) -> None:
        """Set it behind all that has been queued."""

    def synchronize(self) -> None:
        """Wait until the device has passed it; returns at once if it was never recorded."""


class Staging(Protocol):
    """Where inputs wait for their copy to the device."""

    def stage(self, tensors: Sequence[Tensor]) -> list[Tensor]:
        """The tensors in memory that the device can copy from; valid until the second call after this."""


class NoStaging:
    """Leaves tensors where they are: the device is the CPU."""

    def stage(self, tensors: Sequence[Tensor]) -> list[Tensor]:
        """The tensors themselves."""
        return list(tensors)


class PinnedStaging:
    """Holds tensors in page-locked memory, and copies others there, until the device has copied them."""

    def __init__(
        self,
        allocate: Callable[[int], Tensor],
        make_event: Callable[[], Event],
        is_pinned: Callable[[Tensor], bool],
    ) -> None:
        """
        Args:
            allocate: number of bytes -> page-locked memory [n] uint8.
            make_event: gives an event of the stream that all copies are queued on.
            is_pinned: whether a tensor is in page-locked memory.
        """
        self._allocate = allocate
        self._is_pinned = is_pinned
        self._held: list[list[Tensor]] = [[] for _ in range(NUM_SLOTS)]
        self._slots = [torch.empty(0, dtype=torch.uint8) for _ in range(NUM_SLOTS)]
        self._copied = [make_event() for _ in range(NUM_SLOTS)]
        self._latest = 0

    def stage(self, tensors: Sequence[Tensor]) -> list[Tensor]:
        """See `Staging`."""
        # 1. All copies from the latest slot have been queued; the other one's are waited for, long done.
        self._copied[self._latest].record()
        self._latest = (self._latest + 1) % NUM_SLOTS
        self._copied[self._latest].synchronize()
        # 2. Those that are page-locked stay where they are; the slot holds them, or whoever owns their
        #    memory would write it again.
        is_pinned = [not tensor.numel() or self._is_pinned(tensor) for tensor in tensors]
        self._held[self._latest] = list(tensors)
        # 3. Others are copied, one after another.
        places, end = [], 0
        for tensor, stays in zip(tensors, is_pinned, strict=True):
            places.append(end)
            end += 0 if stays else -(-tensor.nbytes // _ALIGNMENT) * _ALIGNMENT
        slot = self._slots[self._latest]
        if end > slot.numel():
            slot = self._slots[self._latest] = self._allocate(int(HEADROOM * end))
        return [
            tensor
            if stays
            else slot[place : place + tensor.nbytes].view(tensor.dtype).view(tensor.shape).copy_(tensor)
            for tensor, place, stays in zip(tensors, places, is_pinned, strict=True)
        ]


def build_staging(device: torch.device) -> Staging:
    """The staging of a rank on `device`."""
    if device.type != "cuda":
        return NoStaging()
    return PinnedStaging(
        lambda num_bytes: torch.empty(num_bytes, dtype=torch.uint8, pin_memory=True),
        torch.cuda.Event,
        lambda tensor: tensor.is_pinned(),
    )


def page_lock(memory: np.ndarray) -> Callable[[], None]:
    """Have CUDA register host memory [n] uint8 as page-locked; gives what undoes it.

    Raises `MachineError` if it refuses.
    """
    cudart, address = torch.cuda.cudart(), memory.ctypes.data
    code = int(cudart.cudaHostRegister(address, memory.nbytes, 0))
    if code:
        raise MachineError(
            f"cudaHostRegister of {memory.nbytes / 2**20:.0f} MiB for the data of a step fails with error "
            f"{code}: let the job lock more memory (`ulimit -l`), or set data.read_in=thread"
        )
    return lambda: cudart.cudaHostUnregister(address)
