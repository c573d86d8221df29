"""Which pieces of memory a forward pass saves tensors from, and what was stored of them."""

import weakref
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.multiprocessing.reductions import StorageWeakRef

from parallel.activations.packed import Packed, Restorable, View
from parallel.activations.recompute import Recomputation


class Geometry(NamedTuple):
    """Where a tensor's elements lie in its memory."""

    size: tuple[int, ...]
    stride: tuple[int, ...]
    offset: int
    """Of its first element, in elements."""
    dtype: torch.dtype

    @classmethod
    def of(cls, tensor: Tensor) -> "Geometry":
        """A tensor's."""
        return cls(tuple(tensor.shape), tensor.stride(), int(tensor.storage_offset()), tensor.dtype)

    @property
    def span(self) -> int:
        """Elements from the first to the last; of a tensor without elements, 0."""
        if 0 in self.size:
            return 0
        return 1 + sum((size - 1) * stride for size, stride in zip(self.size, self.stride, strict=True))

    def is_dense(self) -> bool:
        """Whether it has every element from its first to its last, once."""
        return self.span == torch.Size(self.size).numel() and (0 not in self.stride or self.span <= 1)

    def is_inside(self, other: "Geometry") -> bool:
        """Whether all its elements lie between the first and the last of `other`."""
        end, other_end = self.offset + self.span, other.offset + other.span
        return self.dtype is other.dtype and other.offset <= self.offset and end <= other_end


class CallOutput(NamedTuple):
    """Which output of which call a tensor is."""

    call: "weakref.ref[Recomputation]"
    """The graph holds it."""
    output: int


@dataclass(slots=True, eq=False)
class SavedStorage:
    """A piece of memory that tensors to be saved are in."""

    name: str
    base: Geometry
    """The tensor that has the name; what is saved of it is stored as a whole, if it is dense."""
    is_named: bool
    """Whether the model gave that tensor its name, rather than a stretch of the pass."""
    nbytes: int
    alive: StorageWeakRef
    """Keeps the address, though not the memory, from being used again."""
    made_by: CallOutput | None = None
    """What makes it again; None if nothing does."""
    is_kept: bool = False
    parts: list[tuple[Geometry, "weakref.ref[Restorable]"]] = field(default_factory=list)
    """What is stored."""

    def find(self, wanted: Geometry) -> Packed | None:
        """What stands for these elements, if they are stored."""
        for base, reference in self.parts:
            saved = reference()
            if saved is not None:
                if wanted == base:
                    return saved
                if self.made_by is not None or (base.is_dense() and wanted.is_inside(base)):
                    return view(saved, base, wanted)
        return None

    def add(self, base: Geometry, saved: Restorable) -> None:
        """Remember what is stored, as long as a node of the graph holds it."""
        self.parts.append((base, weakref.ref(saved)))


def view(saved: Restorable, base: Geometry, wanted: Geometry) -> View:
    """Elements of a stored tensor, which were `wanted` when it was `base`."""
    return View(saved, wanted.size, wanted.stride, wanted.offset - base.offset)


class StorageTable:
    """All pieces of memory that a pass has met, by address."""

    def __init__(self) -> None:
        self._by_address: dict[int, SavedStorage] = {}

    def find(self, tensor: Tensor) -> SavedStorage | None:
        """The memory that a tensor is in, if it has been entered."""
        return self._by_address.get(storage_id(tensor))

    def add(
        self, tensor: Tensor, name: str, *, is_named: bool, made_by: CallOutput | None = None
    ) -> SavedStorage:
        """Enter the memory of a tensor under its name."""
        storage = tensor.untyped_storage()
        alive = StorageWeakRef(storage)
        entry = SavedStorage(name, Geometry.of(tensor), is_named, storage.nbytes(), alive, made_by)
        self._by_address[storage_id(tensor)] = entry
        return entry


def storage_id(tensor: Tensor) -> int:
    """Tells one piece of memory that is in use from another; all views of one have the same."""
    return tensor.untyped_storage()._cdata


def deallocate_data(tensor: Tensor) -> None:
    """Free a tensor's memory, unless others hold it too; its shape, history and gradient stay.

    Only for tensors that were saved within a `SavingPass`, if at all: torch's own way of saving holds the
    same object, and would compute gradients with what is in it now.
    """
    tensor.data = tensor.new_empty(()).expand(tensor.shape)


def weights_of(modules: Iterable[nn.Module]) -> frozenset[int]:
    """The addresses of all parameters and buffers."""
    tensors = [tensor for module in modules for tensor in (*module.parameters(), *module.buffers())]
    return frozenset(storage_id(tensor) for tensor in tensors)
