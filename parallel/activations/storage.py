"""The storages that a forward pass saves tensors from, and what has been packed of each.

A storage is torch's: a piece of memory that a tensor and all its views share.
"""

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
    """Where a tensor's elements are in its storage."""

    size: tuple[int, ...]
    stride: tuple[int, ...]
    offset: int
    """Offset of the first element, in elements."""
    dtype: torch.dtype

    @classmethod
    def of(cls, tensor: Tensor) -> "Geometry":
        """The geometry of a tensor."""
        return cls(tuple(tensor.shape), tensor.stride(), int(tensor.storage_offset()), tensor.dtype)

    @property
    def span(self) -> int:
        """Number of elements from the first to the last; 0 for an empty tensor."""
        if 0 in self.size:
            return 0
        return 1 + sum((size - 1) * stride for size, stride in zip(self.size, self.stride, strict=True))

    def is_dense(self) -> bool:
        """Whether it has every element between its first and its last exactly once."""
        return self.span == torch.Size(self.size).numel() and (0 not in self.stride or self.span <= 1)

    def is_inside(self, other: "Geometry") -> bool:
        """Whether all its elements are between the first and the last of `other`."""
        end, other_end = self.offset + self.span, other.offset + other.span
        return self.dtype is other.dtype and other.offset <= self.offset and end <= other_end


class CallOutput(NamedTuple):
    """The output of a recomputed call that a tensor is."""

    call: "weakref.ref[Recomputation]"
    """The call; autograd's graph owns it."""
    output: int
    """Index of the output."""


@dataclass(slots=True, eq=False)
class SavedStorage:
    """A storage that saved tensors are in."""

    name: str
    base: Geometry
    """The tensor that has the name; if it is dense, it is packed whole, whichever view of it is saved."""
    is_named: bool
    """Whether the model named the tensor itself (`named`), rather than a stretch of the pass (`saves`)."""
    nbytes: int
    alive: StorageWeakRef
    """Keeps the id, but not the memory, from being reused."""
    made_by: CallOutput | None = None
    """The call that can recompute it; None if there is none."""
    is_kept: bool = False
    """Whether its tensors stay on the device unchanged."""
    packed: list[tuple[Geometry, "weakref.ref[Restorable]"]] = field(default_factory=list)
    """What has been packed of it, with where it was."""

    def find(self, wanted: Geometry) -> Packed | None:
        """What restores these elements, if they have been packed already."""
        for base, reference in self.packed:
            saved = reference()
            # No node of the graph holds it any more if the reference is dead.
            if saved is not None:
                if wanted == base:
                    return saved
                # A recomputed output is restored with its whole storage, so any view of it can be taken.
                if self.made_by is not None or (base.is_dense() and wanted.is_inside(base)):
                    return view(saved, base, wanted)
        return None

    def add(self, base: Geometry, saved: Restorable) -> None:
        """Remember what has been packed, as long as a node of the graph holds it."""
        self.packed.append((base, weakref.ref(saved)))


def view(saved: Restorable, base: Geometry, wanted: Geometry) -> View:
    """A view of a packed tensor: the elements that were at `wanted` when the tensor was at `base`."""
    return View(saved, wanted.size, wanted.stride, wanted.offset - base.offset)


class StorageTable:
    """All storages that a pass has seen."""

    def __init__(self) -> None:
        self._by_id: dict[int, SavedStorage] = {}

    def find(self, tensor: Tensor) -> SavedStorage | None:
        """The entry of a tensor's storage; None if there is none yet."""
        return self._by_id.get(storage_id(tensor))

    def add(
        self, tensor: Tensor, name: str, *, is_named: bool, made_by: CallOutput | None = None
    ) -> SavedStorage:
        """Add a tensor's storage under the tensor's name."""
        # The weak reference keeps the id unique as long as this table lives, and lets the memory be freed.
        storage = tensor.untyped_storage()
        alive = StorageWeakRef(storage)
        entry = SavedStorage(name, Geometry.of(tensor), is_named, storage.nbytes(), alive, made_by)
        self._by_id[storage_id(tensor)] = entry
        return entry


def storage_id(tensor: Tensor) -> int:
    """Identifies a storage among those in use; the same for all views of a tensor."""
    # Not `data_ptr`: memory that is freed during the pass is handed out again.
    return tensor.untyped_storage()._cdata


def deallocate_data(tensor: Tensor) -> None:
    """Free a tensor's memory unless others hold it too; its shape, history and gradient stay.

    Only for tensors that were saved within a `SavingPass`, if at all: torch's own way of saving holds the
    same object, and would compute gradients with what is in it afterwards.
    """
    # A single element, expanded: autograd checks shapes, not memory.
    tensor.data = tensor.new_empty(()).expand(tensor.shape)


def weights_of(modules: Iterable[nn.Module]) -> frozenset[int]:
    """The storage ids of all parameters and buffers."""
    tensors = [tensor for module in modules for tensor in (*module.parameters(), *module.buffers())]
    return frozenset(storage_id(tensor) for tensor in tensors)
