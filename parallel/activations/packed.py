"""The forms in which a saved tensor waits for the backward pass.

Autograd's nodes hold a `Restorable`, or a `View` of one, instead of a tensor. What is restored is held as
long as a node needs it: nodes drop what they hold as soon as they have run.
"""

from abc import ABC, abstractmethod
from dataclasses import dataclass

import torch
from torch import Tensor

from parallel.activations.fp8 import Fp8Tensor, compress, decompress
from parallel.activations.offload import OffloadEngine, Ticket
from parallel.activations.recompute import Recomputation
from parallel.pipeline.schedule import PassKey


class Restorable(ABC):
    """A tensor that waits. It is brought back once, whoever asks for it."""

    def __init__(self) -> None:
        self._tensor: Tensor | None = None
        self._ready: torch.cuda.Event | None = None

    def restore(self) -> Tensor:
        """The tensor, for what is computed on the current stream from now on."""
        if self._tensor is None:
            self._tensor = self._bring_back()
            if self._tensor.is_cuda:
                self._ready = torch.cuda.current_stream().record_event()
        elif self._ready is not None:
            # Whoever asked first may have done so on another stream, as the overlapped schedule has two.
            self._ready.wait()
            self._tensor.record_stream(torch.cuda.current_stream())
        return self._tensor

    @abstractmethod
    def _bring_back(self) -> Tensor: ...


class Compressed(Restorable):
    """On the device as FP8."""

    def __init__(self, tensor: Tensor) -> None:
        super().__init__()
        self._compressed: Fp8Tensor | None = compress(tensor)
        self._stride = tensor.stride()
        self.nbytes = self._compressed.values.nbytes + self._compressed.scales.nbytes

    def _bring_back(self) -> Tensor:
        compressed, self._compressed = _only_once(self._compressed), None
        return with_stride(decompress(compressed), self._stride)


class Offloaded(Restorable):
    """In host memory."""

    def __init__(self, tensor: Tensor, engine: OffloadEngine, key: PassKey) -> None:
        super().__init__()
        self._engine = engine
        self._ticket: Ticket | None = engine.save(tensor, key)
        self.nbytes = tensor.nbytes

    def _bring_back(self) -> Tensor:
        ticket, self._ticket = _only_once(self._ticket), None
        return self._engine.load(ticket)


class CompressedOffloaded(Restorable):
    """In host memory as FP8."""

    def __init__(self, tensor: Tensor, engine: OffloadEngine, key: PassKey) -> None:
        super().__init__()
        compressed = compress(tensor)
        self._shape, self._stride, self._dtype = compressed.shape, tensor.stride(), compressed.dtype
        parts = (compressed.values, compressed.scales)
        self._tickets: list[Ticket] | None = [engine.save(part, key) for part in parts]
        self._engine = engine
        self.nbytes = sum(part.nbytes for part in parts)

    def _bring_back(self) -> Tensor:
        tickets, self._tickets = _only_once(self._tickets), None
        values, scales = (self._engine.load(ticket) for ticket in tickets)
        return with_stride(decompress(Fp8Tensor(values, scales, self._shape, self._dtype)), self._stride)


class Recomputed(Restorable):
    """Nowhere: an output of a function that is run again."""

    def __init__(self, recomputation: Recomputation, index: int, memory_bytes: int) -> None:
        """
        Args:
            index: of the output.
            memory_bytes: of the memory that the output was in, into which views were taken.
        """
        super().__init__()
        self._recomputation, self._index, self._memory_bytes = recomputation, index, memory_bytes

    def _bring_back(self) -> Tensor:
        output = self._recomputation.outputs()[self._index]
        if output.untyped_storage().nbytes() != self._memory_bytes:
            raise RuntimeError(
                f"a recomputed tensor of shape {tuple(output.shape)} lies in "
                f"{output.untyped_storage().nbytes()} bytes, and lay in {self._memory_bytes} in the forward "
                "pass: its function has to do the same each time"
            )
        return output


def with_stride(tensor: Tensor, stride: tuple[int, ...]) -> Tensor:
    """The same numbers laid out with these strides, which leave no gaps; views of it rely on them."""
    if tensor.stride() == stride or tensor.numel() != _span(tensor.shape, stride):
        return tensor
    return torch.empty_strided(tensor.shape, stride, dtype=tensor.dtype, device=tensor.device).copy_(tensor)


def _span(shape: torch.Size, stride: tuple[int, ...]) -> int:
    """Elements from the first to the last."""
    return 1 + sum((size - 1) * step for size, step in zip(shape, stride, strict=True))


def _only_once[Source](source: Source | None) -> Source:
    """What is brought back; its source is dropped with that, and not needed again."""
    assert source is not None, "`restore` brings it back once"
    return source


@dataclass(frozen=True, slots=True)
class View:
    """Elements of a saved tensor, as `torch.as_strided` names them."""

    saved: Restorable
    size: tuple[int, ...]
    stride: tuple[int, ...]
    offset: int
    """From the first element of the saved tensor."""

    def restore(self) -> Tensor:
        """The view, for what is computed on the current stream from now on."""
        tensor = self.saved.restore()
        return tensor.as_strided(self.size, self.stride, tensor.storage_offset() + self.offset)


@dataclass(frozen=True, slots=True)
class Kept:
    """A tensor on the device as it is."""

    tensor: Tensor
    version: int

    @classmethod
    def of(cls, tensor: Tensor) -> "Kept":
        """A tensor as it is now."""
        return cls(tensor, tensor._version)

    def restore(self) -> Tensor:
        """The tensor; RuntimeError if it was changed, of which torch does not tell where there are hooks."""
        if self.tensor._version != self.version:
            raise RuntimeError(
                f"a tensor of shape {tuple(self.tensor.shape)} that the backward pass needs was changed in "
                "place after the forward pass had saved it"
            )
        return self.tensor


Packed = Tensor | Kept | Restorable | View
"""What stands for a tensor in autograd's graph; a weight stands for itself."""


def unpack(packed: Packed) -> Tensor:
    """The tensor that something stands for."""
    return packed if isinstance(packed, Tensor) else packed.restore()
