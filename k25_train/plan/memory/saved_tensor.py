"""One tensor that autograd saves, as plans list it; torch-free."""

from dataclasses import dataclass
from math import prod

BOOL_BYTES, BOUND_BYTES, FLOAT_BYTES, INDEX_BYTES, COMPLEX_BYTES = 1, 4, 4, 8, 8
"""Bytes of bool, int32, float32, int64 and complex64."""


@dataclass(frozen=True, slots=True, kw_only=True)
class SavedTensor:
    """A tensor that autograd saves; views of the same memory count once."""

    name: str
    """Name of the activation, as in `activation.<name>`."""
    shape: tuple[int, ...]
    """Its dimensions; empty for a scalar."""
    num_bytes: int
    """Bytes of its elements."""
    memory_bytes: int
    """Bytes that it keeps from being freed if it is kept unchanged: more than its own if it is a view."""
    may_be_rounded: bool
    """Whether it may be stored in FP8: the model gave it its name, and it is of floating point and has more
    than one dimension. Statistics that a kernel keeps, and indices, may not."""
    is_made_again: bool
    """Whether it is an output of what `recompute` runs again."""


def exact(
    name: str, shape: tuple[int, ...], element_bytes: int, *, memory_bytes: int | None = None
) -> SavedTensor:
    """A tensor that is never rounded, which keeps its own bytes from being freed unless told otherwise."""
    num_bytes = prod(shape) * element_bytes
    return SavedTensor(
        name=name,
        shape=shape,
        num_bytes=num_bytes,
        memory_bytes=num_bytes if memory_bytes is None else memory_bytes,
        may_be_rounded=False,
        is_made_again=False,
    )
