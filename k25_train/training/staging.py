"""Page-locked memory for what goes to the device in a step: allocated once and used again.

A GPU copies from such memory while it computes. Allocating it may wait for kernels that run, those of NCCL
included, which may wait for other ranks; so there is a ring of two slots, each for one step, that only grow.
"""

from collections.abc import Callable, Sequence
from typing import Protocol

import torch
from torch import Tensor

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
    """Copies tensors into page-locked memory. Their own may be freed or overwritten afterwards."""

    def __init__(self, allocate: Callable[[int], Tensor], make_event: Callable[[], Event]) -> None:
        """
        Args:
            allocate: number of bytes -> page-locked memory [n] uint8.
            make_event: gives an event of the stream that all copies are queued on.
        """
        self._allocate = allocate
        self._slots = [torch.empty(0, dtype=torch.uint8) for _ in range(NUM_SLOTS)]
        self._copied = [make_event() for _ in range(NUM_SLOTS)]
        self._latest = 0

    def stage(self, tensors: Sequence[Tensor]) -> list[Tensor]:
        """See `Staging`."""
        # 1. All copies from the latest slot have been queued; the other one's are waited for, long done.
        self._copied[self._latest].record()
        self._latest = (self._latest + 1) % NUM_SLOTS
        self._copied[self._latest].synchronize()
        # 2. Tensors one after another. Empty ones take no place.
        places, end = [], 0
        for tensor in tensors:
            places.append(end)
            end += -(-tensor.nbytes // _ALIGNMENT) * _ALIGNMENT
        slot = self._slots[self._latest]
        if end > slot.numel():
            slot = self._slots[self._latest] = self._allocate(int(HEADROOM * end))
        staged = []
        for tensor, place in zip(tensors, places, strict=True):
            place_in_slot = slot[place : place + tensor.nbytes].view(tensor.dtype).view(tensor.shape)
            staged.append(place_in_slot.copy_(tensor))
        return staged


def build_staging(device: torch.device) -> Staging:
    """The staging of a rank on `device`."""
    if device.type != "cuda":
        return NoStaging()
    return PinnedStaging(
        lambda num_bytes: torch.empty(num_bytes, dtype=torch.uint8, pin_memory=True), torch.cuda.Event
    )
