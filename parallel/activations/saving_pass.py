"""What one forward pass leaves for its backward pass, tensor by tensor as its policy says.

Autograd shows every tensor that it saves to `torch.autograd.graph.saved_tensors_hooks`. A `SavingPass` finds
its name by its storage, and puts what the name's policy makes of it into the graph. What several operations
save, whole or in part, is stored once. The names come from the model: see `annotate.py`.
"""

import weakref
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar
from functools import partial
from typing import Any, NamedTuple, Self

import torch
from torch import Tensor

from parallel.activations.offload import OffloadEngine
from parallel.activations.packed import (
    Compressed,
    CompressedOffloaded,
    Kept,
    Offloaded,
    Packed,
    Recomputed,
    Restorable,
    unpack,
)
from parallel.activations.policy import Policy
from parallel.activations.recompute import Recomputation, RecomputedCall, as_tuple, call_apart
from parallel.activations.sizes import SMALLEST_OFFLOADED_BYTES
from parallel.activations.storage import CallOutput, Geometry, SavedStorage, StorageTable, storage_id, view
from parallel.pipeline.schedule import PassKey

REST = "rest"
"""The name of what is saved without one."""

_current: ContextVar["SavingPass | None"] = ContextVar("saving_pass", default=None)


class SaveRecord(NamedTuple):
    """A tensor that was saved, for who counts them."""

    name: str
    shape: tuple[int, ...]
    dtype: torch.dtype
    policy: Policy
    """What was done with it: where its name's policy does not apply, `keep`."""
    device_bytes: int
    """Held on the device. Of a tensor kept as it is, all the storage that it keeps from being freed."""
    host_bytes: int


class SavingPass:
    """The saved tensors of one forward pass of one chunk."""

    def __init__(
        self,
        policies: Mapping[str, Policy],
        key: PassKey,
        weights: frozenset[int],
        engine: OffloadEngine | None,
        observe: Callable[[SaveRecord], None] | None = None,
    ) -> None:
        """
        Args:
            policies: of every name, `rest` among them.
            key: which pass it is.
            weights: the addresses of what is saved, but no activation (`weights_of`).
            engine: takes tensors to the host; without one they stay.
            observe: is told of every tensor that is stored.
        """
        self._policies, self._key, self._weights = policies, key, weights
        self._engine, self._observe = engine, observe
        self._storages = StorageTable()
        self._name = REST

    @classmethod
    def current(cls) -> Self | None:
        """The pass that runs on this thread; None if tensors are saved as torch does it."""
        return _current.get()  # type: ignore[return-value]

    @contextmanager
    def active(self) -> Iterator[None]:
        """Within it, tensors are saved by policy. It may be entered again: a pass can run in pieces."""
        token = _current.set(self)
        try:
            with torch.autograd.graph.saved_tensors_hooks(self._pack, unpack):
                yield
        finally:
            _current.reset(token)

    def policy_of(self, name: str) -> Policy:
        """Raises KeyError for a name that the configuration does not have."""
        if name not in self._policies:
            raise KeyError(f"{name} is not the name of an activation; known: {', '.join(self._policies)}")
        return self._policies[name]

    def name(self, name: str, tensor: Tensor) -> None:
        """Give a tensor a name. Raises ValueError if another shares its storage."""
        self.policy_of(name)
        storage = self._storages.find(tensor)
        if storage is None:
            self._storages.add(tensor, name, is_named=True)
        elif storage.name != name:
            raise ValueError(f"a tensor named {name} shares the storage of one named {storage.name}")

    @contextmanager
    def naming(self, name: str) -> Iterator[None]:
        """Within it, what has no name gets this one as it is saved."""
        self.policy_of(name)
        before, self._name = self._name, name
        try:
            yield
        finally:
            self._name = before

    def call(self, name: str, function: Callable[..., Any], inputs: tuple[Tensor, ...]) -> Any:
        """Call a function whose outputs get a name; one that can be called again if the policy says so."""
        needs_grad = [tensor.requires_grad for tensor in inputs]
        has_graph = any(needs_grad) and torch.is_grad_enabled()
        if self.policy_of(name) is not Policy.recompute or not has_graph:
            with self.naming(name):
                outputs = call_apart(function, inputs)
            for output in as_tuple(outputs):
                self.name(name, output)
            return outputs
        saved = [partial(unpack, self._pack(tensor)) for tensor in inputs]
        recomputation = Recomputation(function, saved, needs_grad)
        outputs = RecomputedCall.apply(recomputation, function, *inputs)
        for number, output in enumerate(as_tuple(outputs)):
            made_by = CallOutput(weakref.ref(recomputation), number)
            self._storages.add(output, name, is_named=True, made_by=made_by)
        return outputs

    def _pack(self, tensor: Tensor) -> Packed:
        tensor = tensor.detach()
        if not tensor.numel() or storage_id(tensor) in self._weights:
            return tensor
        storage = self._storages.find(tensor) or self._storages.add(tensor, self._name, is_named=False)
        geometry = Geometry.of(tensor)
        is_other_view = storage.made_by is not None and tensor.dtype is not storage.base.dtype
        if storage.is_kept or is_other_view or tensor.is_conj() or tensor.is_neg():
            return Kept.of(tensor)
        found = storage.find(geometry)
        if found is not None:
            return found
        base = storage.base
        if storage.made_by is None and not (geometry.is_inside(base) and base.is_dense()):
            base = geometry
        whole = tensor.as_strided(base.size, base.stride, base.offset)
        saved = self._store(storage, whole)
        if saved is None:
            storage.is_kept = True
            return Kept.of(tensor)
        storage.add(base, saved)
        return saved if base == geometry else view(saved, base, geometry)

    def _store(self, storage: SavedStorage, tensor: Tensor) -> Restorable | None:
        """Store a tensor as its policy says; None if it is to be kept as it is."""
        policy = self._policy_for(storage, tensor)
        saved: Restorable | None = None
        device_bytes = storage.nbytes if policy is Policy.keep else 0
        host_bytes = 0
        call = None if storage.made_by is None else storage.made_by.call()
        if storage.made_by is not None and call is not None:
            saved = Recomputed(call, storage.made_by.output, storage.nbytes)
        elif policy is Policy.fp8:
            saved = compressed = Compressed(tensor)
            device_bytes = compressed.nbytes
        elif policy.offloads:
            assert self._engine is not None, "_policy_for offloads with an engine only"
            kind = CompressedOffloaded if policy.compresses else Offloaded
            saved = offloaded = kind(tensor, self._engine, self._key)
            host_bytes = offloaded.nbytes
        if self._observe is not None:
            shape = tuple(tensor.shape)
            self._observe(SaveRecord(storage.name, shape, tensor.dtype, policy, device_bytes, host_bytes))
        return saved

    def _policy_for(self, storage: SavedStorage, tensor: Tensor) -> Policy:
        """What can be done with a tensor of what its name's policy asks for."""
        policy = self.policy_of(storage.name)
        if policy is Policy.recompute:
            # What was made with it beside the call's outputs, or outlives the call, has to stay.
            is_made_again = storage.made_by is not None and storage.made_by.call() is not None
            return Policy.recompute if is_made_again else Policy.keep
        # Statistics that an operation saves beside the tensor that has the name are not to be rounded.
        is_rounded = storage.is_named and tensor.dtype in (torch.float32, torch.bfloat16) and tensor.dim() > 1
        if policy.compresses and not is_rounded:
            policy = Policy.offload if policy.offloads else Policy.keep
        if policy.offloads and not self._can_offload(tensor):
            policy = Policy.fp8 if policy.compresses else Policy.keep
        return policy

    def _can_offload(self, tensor: Tensor) -> bool:
        is_large = tensor.nbytes >= SMALLEST_OFFLOADED_BYTES
        return self._engine is not None and is_large and tensor.device == self._engine.device
