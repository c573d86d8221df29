"""What one forward pass saves for its backward pass, each tensor by its policy.

Autograd shows every tensor that it saves to `torch.autograd.graph.saved_tensors_hooks`. A `SavingPass` finds
its name by its storage, packs it as the name's policy says, and puts the result into the graph. What several
operations save, whole or in part, is packed once. The names are given by the model (`annotate.py`).
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
"""The name of tensors that the model does not name."""

_current: ContextVar["SavingPass | None"] = ContextVar("saving_pass", default=None)


class SaveRecord(NamedTuple):
    """One packed tensor, for those who count them."""

    name: str
    shape: tuple[int, ...]
    dtype: torch.dtype
    policy: Policy
    """The policy applied: `keep` where the name's policy cannot be."""
    device_bytes: int
    """Bytes held on the device. A kept tensor holds its whole storage."""
    host_bytes: int
    """Bytes held in host memory."""


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
            policies: name -> policy, for every name, `rest` included.
            key: the pass.
            weights: storage ids of tensors that are no activations (`weights_of`).
            engine: offloads tensors; None if all stay on the device.
            observe: called for every packed tensor.
        """
        self._policies, self._key, self._weights = policies, key, weights
        self._engine, self._observe = engine, observe
        self._storages = StorageTable()
        self._name = REST

    @classmethod
    def current(cls) -> Self | None:
        """The pass that is active in this context; None if tensors are saved as torch does it."""
        return _current.get()  # type: ignore[return-value]

    @contextmanager
    def active(self) -> Iterator[None]:
        """Save tensors by policy within this context; can be entered repeatedly: a pass may run in pieces."""
        token = _current.set(self)
        try:
            with torch.autograd.graph.saved_tensors_hooks(self._pack, unpack):
                yield
        finally:
            _current.reset(token)

    def policy_of(self, name: str) -> Policy:
        """The policy of a name; KeyError for a name that the configuration does not have."""
        if name not in self._policies:
            raise KeyError(f"{name} is not the name of an activation; known: {', '.join(self._policies)}")
        return self._policies[name]

    def name(self, name: str, tensor: Tensor) -> None:
        """Give a tensor a name. Raises ValueError if its storage has another."""
        self.policy_of(name)
        storage = self._storages.find(tensor)
        if storage is None:
            self._storages.add(tensor, name, is_named=True)
        elif storage.name != name:
            raise ValueError(f"a tensor named {name} shares the storage of one named {storage.name}")

    @contextmanager
    def naming(self, name: str) -> Iterator[None]:
        """Within this context, tensors without a name are saved under this one."""
        self.policy_of(name)
        before, self._name = self._name, name
        try:
            yield
        finally:
            self._name = before

    def call(self, name: str, function: Callable[..., Any], inputs: tuple[Tensor, ...]) -> Any:
        """Call a function whose outputs get a name; if the policy says so, it is recomputed for them."""
        # 1. Without recomputation: call it, and name what it saves and returns.
        needs_grad = [tensor.requires_grad for tensor in inputs]
        has_graph = any(needs_grad) and torch.is_grad_enabled()
        if self.policy_of(name) is not Policy.recompute or not has_graph:
            with self.naming(name):
                outputs = call_apart(function, inputs)
            for output in as_tuple(outputs):
                self.name(name, output)
            return outputs
        # 2. With recomputation: pack the inputs, and run it without a graph inside.
        saved = [partial(unpack, self._pack(tensor)) for tensor in inputs]
        recomputation = Recomputation(function, saved, needs_grad)
        outputs = RecomputedCall.apply(recomputation, function, *inputs)
        # 3. Whoever saves an output gets a reference to the call.
        for number, output in enumerate(as_tuple(outputs)):
            made_by = CallOutput(weakref.ref(recomputation), number)
            self._storages.add(output, name, is_named=True, made_by=made_by)
        return outputs

    def _pack(self, tensor: Tensor) -> Packed:
        """The pack hook: what goes into the graph in place of a saved tensor."""
        # 1. Weights and empty tensors take no activation memory.
        tensor = tensor.detach()
        if not tensor.numel() or storage_id(tensor) in self._weights:
            return tensor
        # 2. Find the storage; what is not named yet gets the current stretch's name.
        storage = self._storages.find(tensor) or self._storages.add(tensor, self._name, is_named=False)
        geometry = Geometry.of(tensor)
        is_other_view = storage.made_by is not None and tensor.dtype is not storage.base.dtype
        # 3. Keep what the storage's policy keeps, and views that strides cannot describe.
        if storage.is_kept or is_other_view or tensor.is_conj() or tensor.is_neg():
            return Kept.of(tensor)
        # 4. Several operations may save the same elements: they are packed once.
        found = storage.find(geometry)
        if found is not None:
            return found
        # 5. Pack the named tensor as a whole and return a view of it, or pack just what is saved.
        base = storage.base
        if storage.made_by is None and not (geometry.is_inside(base) and base.is_dense()):
            base = geometry
        whole = tensor.as_strided(base.size, base.stride, base.offset)
        saved = self._pack_by_policy(storage, whole)
        if saved is None:
            storage.is_kept = True
            return Kept.of(tensor)
        storage.add(base, saved)
        return saved if base == geometry else view(saved, base, geometry)

    def _pack_by_policy(self, storage: SavedStorage, tensor: Tensor) -> Restorable | None:
        """Pack a tensor as its policy says; None if it is kept unchanged."""
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
            assert self._engine is not None, "_policy_for offloads only with an engine"
            kind = CompressedOffloaded if policy.compresses else Offloaded
            saved = offloaded = kind(tensor, self._engine, self._key)
            host_bytes = offloaded.nbytes
        if self._observe is not None:
            shape = tuple(tensor.shape)
            self._observe(SaveRecord(storage.name, shape, tensor.dtype, policy, device_bytes, host_bytes))
        return saved

    def _policy_for(self, storage: SavedStorage, tensor: Tensor) -> Policy:
        """Its name's policy, as far as it can be applied to this tensor."""
        policy = self.policy_of(storage.name)
        # 1. Recompute only outputs of a call that can still be made: not what the call saved otherwise.
        if policy is Policy.recompute:
            is_made_again = storage.made_by is not None and storage.made_by.call() is not None
            return Policy.recompute if is_made_again else Policy.keep
        # 2. Round only what the model named: an operation may also save statistics, which must stay exact.
        is_rounded = storage.is_named and tensor.dtype in (torch.float32, torch.bfloat16) and tensor.dim() > 1
        if policy.compresses and not is_rounded:
            policy = Policy.offload if policy.offloads else Policy.keep
        # 3. Offload only what an engine takes and is worth a copy.
        if policy.offloads and not self._can_offload(tensor):
            policy = Policy.fp8 if policy.compresses else Policy.keep
        return policy

    def _can_offload(self, tensor: Tensor) -> bool:
        is_large = tensor.nbytes >= SMALLEST_OFFLOADED_BYTES
        return self._engine is not None and is_large and tensor.device == self._engine.device
