"""The forms in which a saved tensor waits for the backward pass.

Autograd's nodes hold a `Saved`, or a `View` of one, instead of a tensor. What is brought back is held as long
as a node needs it: nodes drop what they hold as soon as they have run.
"""

from abc import ABC, abstractmethod
from dataclasses import dataclass

import torch
from torch import Tensor

from parallel.activations.fp8 import Fp8Tensor, compress, decompress
from parallel.activations.offload import OffloadEngine, Ticket
from parallel.activations.order import Batch
from parallel.activations.replay import Replay


class Saved(ABC):
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

    @property
    @abstractmethod
    def nbytes(self) -> int:
        """What it takes where it waits."""


class Compressed(Saved):
    """On the device as FP8."""

    def __init__(self, tensor: Tensor) -> None:
        super().__init__()
        self._compressed = compress(tensor)

    @property
    def nbytes(self) -> int:
        return self._compressed.values.nbytes + self._compressed.scales.nbytes

    def _bring_back(self) -> Tensor:
        return decompress(self._compressed)


class Offloaded(Saved):
    """In host memory."""

    def __init__(self, tensor: Tensor, engine: OffloadEngine, batch: Batch) -> None:
        super().__init__()
        self._engine = engine
        self._ticket: Ticket = engine.save(tensor, batch)
        self._nbytes = tensor.nbytes

    @property
    def nbytes(self) -> int:
        return self._nbytes

    def _bring_back(self) -> Tensor:
        return self._engine.load(self._ticket)


class CompressedOffloaded(Saved):
    """In host memory as FP8."""

    def __init__(self, tensor: Tensor, engine: OffloadEngine, batch: Batch) -> None:
        super().__init__()
        compressed = compress(tensor)
        self._shape, self._dtype = compressed.shape, compressed.dtype
        self._values = Offloaded(compressed.values, engine, batch)
        self._scales = Offloaded(compressed.scales, engine, batch)

    @property
    def nbytes(self) -> int:
        return self._values.nbytes + self._scales.nbytes

    def _bring_back(self) -> Tensor:
        values, scales = self._values.restore(), self._scales.restore()
        return decompress(Fp8Tensor(values, scales, self._shape, self._dtype))


class Recomputed(Saved):
    """Nowhere: an output of a function that is run again."""

    def __init__(self, replay: Replay, index: int, memory_bytes: int) -> None:
        """
        Args:
            index: of the output.
            memory_bytes: of the memory that the output was in, into which views were taken.
        """
        super().__init__()
        self._replay, self._index, self._memory_bytes = replay, index, memory_bytes

    @property
    def nbytes(self) -> int:
        return 0

    def _bring_back(self) -> Tensor:
        output = self._replay.outputs()[self._index].detach()
        if output.untyped_storage().nbytes() != self._memory_bytes:
            raise RuntimeError(
                f"a recomputed tensor of shape {tuple(output.shape)} lies in "
                f"{output.untyped_storage().nbytes()} bytes, and lay in {self._memory_bytes} in the forward "
                "pass: its function has to do the same each time"
            )
        return output


@dataclass(frozen=True, slots=True)
class View:
    """Elements of a saved tensor, as `torch.as_strided` names them."""

    saved: Saved
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


Packed = Tensor | Kept | Saved | View
"""What stands for a tensor in autograd's graph; a weight stands for itself."""


def unpack(packed: Packed) -> Tensor:
    """The tensor that something stands for."""
    return packed if isinstance(packed, Tensor) else packed.restore()
