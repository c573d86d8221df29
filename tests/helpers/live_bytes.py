"""Counts the bytes of tensors that are alive, on any device, also on one without memory."""

import weakref
from collections.abc import Iterable
from typing import Any

from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


class LiveBytes(TorchDispatchMode):
    """Within: every storage that an operation makes counts until it is freed."""

    def __init__(self, weights: Iterable[Tensor] = ()) -> None:
        """`weights` do not count."""
        super().__init__()
        self._weights = {each.untyped_storage()._cdata for each in weights}
        self.now = self.peak = 0
        """Bytes alive now, and the most at a time."""
        self.at_peak: dict[tuple[tuple[int, ...], str], int] = {}
        """(shape, type) of the tensor that was made first with a storage -> bytes of such at the peak."""
        self._alive: dict[int, tuple[int, tuple[tuple[int, ...], str]]] = {}
        self._references: dict[int, Any] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        for each in tree_leaves(result):
            if isinstance(each, Tensor):
                self._add(each)
        return result

    def _add(self, tensor: Tensor) -> None:
        storage = tensor.untyped_storage()
        key = storage._cdata
        if key in self._alive or key in self._weights:
            return
        self._alive[key] = (storage.nbytes(), (tuple(tensor.shape), str(tensor.dtype).removeprefix("torch.")))
        self._references[key] = weakref.ref(storage, lambda _: self._remove(key))
        self.now += storage.nbytes()
        if self.now > self.peak:
            self.peak = self.now
            self.at_peak = {}
            for num_bytes, what in self._alive.values():
                self.at_peak[what] = self.at_peak.get(what, 0) + num_bytes

    def _remove(self, key: int) -> None:
        num_bytes, _ = self._alive.pop(key)
        del self._references[key]
        self.now -= num_bytes
