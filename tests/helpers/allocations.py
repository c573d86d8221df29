"""What operations allocate, on real or fake tensors."""

from typing import Any

from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


class Allocations(TorchDispatchMode):
    """Notes every operation inside, and its outputs whose storage none of its inputs has."""

    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []
        """Every operation, in order."""
        self._made: list[tuple[str, Tensor]] = []

    def larger_than(self, num_elements: int) -> list[str]:
        """New tensors with more elements than this: operation, type and shape."""
        return [
            f"{name}: {made.dtype} {[*made.shape]}"
            for name, made in self._made
            if made.numel() > num_elements
        ]

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        outputs = func(*args, **(kwargs or {}))
        self.names.append(str(func))
        known = {each.untyped_storage()._cdata for each in _tensors((args, kwargs))}
        self._made += [
            (str(func), each) for each in _tensors(outputs) if each.untyped_storage()._cdata not in known
        ]
        return outputs


def _tensors(tree: Any) -> list[Tensor]:
    return [each for each in tree_leaves(tree) if isinstance(each, Tensor)]
