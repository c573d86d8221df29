"""The forms in which a saved tensor is packed until the backward pass needs it.

Autograd's nodes hold a `Restorable`, or a `View` of one, instead of a tensor. What is restored is held as
long as a node needs it: nodes drop what they hold as soon as they have run.
"""

from abc import ABC, abstractmethod
from dataclasses import dataclass

import torch
from torch import Tensor

from parallel.activations.fp8 import Fp8Tensor, compress, decompress
from parallel.activations.offload import OffloadEngine
from parallel.activations.recompute import Recomputation
from parallel.activations.ticket import Ticket
from parallel.pipeline.schedule import PassKey


class Restorable(ABC):
    """A tensor that is restored once, however many nodes ask for it."""

    def __init__(self) -> None:
        self._tensor: Tensor | None = None
        self._ready: torch.cuda.Event | None = None

    def restore(self) -> Tensor:
        """The tensor, for what is computed on the current stream from now on."""
        if self._tensor is None:
            self._tensor = self._restore()
            if self._tensor.is_cuda:
                self._ready = torch.cuda.current_stream().record_event()
        elif self._ready is not None:
            # The first request may have been on another stream: the overlapped schedule has two.
            self._ready.wait()
            self._tensor.record_stream(torch.cuda.current_stream())
        return self._tensor

    @abstractmethod
    def _restore(self) -> Tensor:
        """Restore the tensor; called once."""


class Compressed(Restorable):
    """A tensor on the device, in FP8."""

    def __init__(self, tensor: Tensor) -> None:
        super().__init__()
        self._compressed: Fp8Tensor | None = compress(tensor)
        self._stride = tensor.stride()
        self.nbytes = self._compressed.values.nbytes + self._compressed.scales.nbytes

    def _restore(self) -> Tensor:
        compressed, self._compressed = _take(self._compressed), None
        return with_stride(decompress(compressed), self._stride)


class Offloaded(Restorable):
    """A tensor in host memory."""

    def __init__(self, tensor: Tensor, engine: OffloadEngine, key: PassKey) -> None:
        super().__init__()
        self._engine = engine
        self._ticket: Ticket | None = engine.save(tensor, key)
        self.nbytes = tensor.nbytes

    def _restore(self) -> Tensor:
        ticket, self._ticket = _take(self._ticket), None
        return self._engine.load(ticket)


class CompressedOffloaded(Restorable):
    """A tensor in host memory, in FP8."""

    def __init__(self, tensor: Tensor, engine: OffloadEngine, key: PassKey) -> None:
        super().__init__()
        # Values and scales are offloaded separately: two tickets.
        compressed = compress(tensor)
        self._shape, self._stride, self._dtype = compressed.shape, tensor.stride(), compressed.dtype
        parts = (compressed.values, compressed.scales)
        self._tickets: list[Ticket] | None = [engine.save(part, key) for part in parts]
        self._engine = engine
        self.nbytes = sum(part.nbytes for part in parts)

    def _restore(self) -> Tensor:
        tickets, self._tickets = _take(self._tickets), None
        values, scales = (self._engine.load(ticket) for ticket in tickets)
        return with_stride(decompress(Fp8Tensor(values, scales, self._shape, self._dtype)), self._stride)


class Recomputed(Restorable):
    """A tensor that is stored nowhere: an output of a function that is run again."""

    def __init__(self, recomputation: Recomputation, index: int, memory_bytes: int) -> None:
        """
        Args:
            index: which output it is.
            memory_bytes: size of the storage that the output was in, and that views were taken of.
        """
        super().__init__()
        self._recomputation, self._index, self._memory_bytes = recomputation, index, memory_bytes

    def _restore(self) -> Tensor:
        output = self._recomputation.outputs()[self._index]
        if output.untyped_storage().nbytes() != self._memory_bytes:
            raise RuntimeError(
                f"a recomputed tensor of shape {tuple(output.shape)} has a storage of "
                f"{output.untyped_storage().nbytes()} bytes, but had one of {self._memory_bytes} in the "
                "forward pass: its function must do the same each time"
            )
        return output


def with_stride(tensor: Tensor, stride: tuple[int, ...]) -> Tensor:
    """The same numbers with these strides, if they are dense; views of the tensor rely on its strides."""
    if tensor.stride() == stride or tensor.numel() != _span(tensor.shape, stride):
        return tensor
    return torch.empty_strided(tensor.shape, stride, dtype=tensor.dtype, device=tensor.device).copy_(tensor)


def _span(shape: torch.Size, stride: tuple[int, ...]) -> int:
    """Number of elements from the first to the last."""
    return 1 + sum((size - 1) * step for size, step in zip(shape, stride, strict=True))


def _take[Source](source: Source | None) -> Source:
    """A source that is about to be restored and dropped."""
    assert source is not None, "`restore` calls `_restore` only once"
    return source


@dataclass(frozen=True, slots=True)
class View:
    """Elements of a packed tensor, addressed as by `torch.as_strided`."""

    saved: Restorable
    size: tuple[int, ...]
    stride: tuple[int, ...]
    offset: int
    """Offset from the first element of the packed tensor."""

    def restore(self) -> Tensor:
        """The view, for what is computed on the current stream from now on."""
        tensor = self.saved.restore()
        return tensor.as_strided(self.size, self.stride, tensor.storage_offset() + self.offset)


@dataclass(frozen=True, slots=True)
class Kept:
    """A tensor that stays on the device unchanged."""

    tensor: Tensor
    version: int
    """torch's version counter when it was saved."""

    @classmethod
    def of(cls, tensor: Tensor) -> "Kept":
        """A tensor in its current version."""
        return cls(tensor, tensor._version)

    def restore(self) -> Tensor:
        """The tensor; RuntimeError if it was changed, which torch does not check where there are hooks."""
        if self.tensor._version != self.version:
            raise RuntimeError(
                f"a tensor of shape {tuple(self.tensor.shape)} that the backward pass needs was changed in "
                "place after the forward pass had saved it"
            )
        return self.tensor


Packed = Tensor | Kept | Restorable | View
"""What replaces a tensor in autograd's graph; weights are left as they are."""


def unpack(packed: Packed) -> Tensor:
    """The tensor that was packed."""
    return packed if isinstance(packed, Tensor) else packed.restore()
