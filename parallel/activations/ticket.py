"""What the offload engine knows of a tensor, and the ticket that its owner holds for it."""

from collections import deque
from dataclasses import dataclass

from torch import Tensor

from parallel.activations.pool import Block
from parallel.host.copier import Event
from parallel.pipeline.schedule import PassKey


@dataclass(slots=True, eq=False)
class OffloadedTensor:
    """A tensor given to the engine."""

    key: PassKey
    """The pass that saved it."""
    block: Block
    """Its block of host memory."""
    host: Tensor
    """The block, as a tensor of the same shape, strides and dtype."""
    device: Tensor | None
    """The tensor itself until its copy is complete, or longer if prefetched; later the one copied back."""
    version: int | None
    """torch's version counter when it was saved; None once the tensor may be changed."""
    to_host: Event
    """The end of the copy to the host."""
    to_device: Event | None = None
    """The end of the last copy back; None as long as `device` is the tensor itself."""
    is_in_host: bool = False
    """Whether the copy in the host is known to be complete."""
    is_prefetched: bool = False
    """Whether a prefetch was requested, and no load has followed."""


class Ticket:
    """The handle of a saved tensor. Dropping it frees all memory of the tensor."""

    __slots__ = ("_dropped", "saved")

    def __init__(self, saved: OffloadedTensor, dropped: deque[OffloadedTensor]) -> None:
        self.saved = saved
        """What the engine knows of the tensor; for the engine alone."""
        self._dropped = dropped

    def __del__(self) -> None:
        # Nothing else: the garbage collector may run this within any call of the engine.
        self._dropped.append(self.saved)
