"""A part of a tensor: a range of its elements, laid flat. Everything that a rank holds is one or several.

There is no tensor parallelism: parameters are whole, stacks of experts are cut along their first axis, and
ZeRO-1 cuts flat buffers. So no layout cuts a tensor otherwise, and another layout is other ranges.
"""

import math
from dataclasses import dataclass

import torch

from k25_train.errors import CheckpointError

DTYPE_NAMES: dict[torch.dtype, str] = {
    torch.float64: "F64",
    torch.float32: "F32",
    torch.float16: "F16",
    torch.bfloat16: "BF16",
    torch.float8_e4m3fn: "F8_E4M3",
    torch.float8_e5m2: "F8_E5M2",
    torch.int64: "I64",
    torch.int32: "I32",
    torch.int16: "I16",
    torch.int8: "I8",
    torch.uint64: "U64",
    torch.uint32: "U32",
    torch.uint16: "U16",
    torch.uint8: "U8",
    torch.bool: "BOOL",
}
"""dtype -> its name in a safetensors header (safetensors 0.8, `safetensors/src/tensor.rs`, `enum Dtype`)."""
DTYPES: dict[str, torch.dtype] = {name: dtype for dtype, name in DTYPE_NAMES.items()}
"""Name in a safetensors header -> dtype."""


@dataclass(frozen=True, slots=True)
class TensorInfo:
    """A whole tensor."""

    dtype: torch.dtype
    """Of its elements, as they are stored."""
    shape: tuple[int, ...]
    """Sizes of its axes; empty for a scalar."""

    @property
    def numel(self) -> int:
        """Its elements."""
        return math.prod(self.shape)

    @property
    def num_bytes(self) -> int:
        """Bytes of its elements."""
        return self.numel * self.dtype.itemsize


@dataclass(frozen=True, slots=True)
class Part:
    """A contiguous range of the elements of one tensor.

    Raises CheckpointError for a range that is not within the tensor, and for a dtype that files cannot have.
    """

    name: str
    """Of the tensor."""
    dtype: torch.dtype
    """Of its elements."""
    shape: tuple[int, ...]
    """Of the whole tensor."""
    start: int
    """First element, counted in the flattened whole tensor."""
    stop: int
    """One after the last."""

    def __post_init__(self) -> None:
        if not self.name or self.dtype not in DTYPE_NAMES:
            raise CheckpointError(f"{self.name!r} of {self.dtype} cannot be stored: see DTYPE_NAMES")
        if not 0 <= self.start <= self.stop <= math.prod(self.shape):
            raise CheckpointError(
                f"{self.name}: elements {self.start} to {self.stop} are not in its shape {list(self.shape)}"
            )

    @property
    def numel(self) -> int:
        """Its elements."""
        return self.stop - self.start

    @property
    def num_bytes(self) -> int:
        """Bytes of its elements."""
        return self.numel * self.dtype.itemsize

    @property
    def info(self) -> TensorInfo:
        """The whole tensor."""
        return TensorInfo(self.dtype, self.shape)

    @property
    def entry(self) -> str:
        """Its name in a file: `NAME[start:stop]`."""
        return f"{self.name}[{self.start}:{self.stop}]"

    def cut(self, first: int, last: int) -> "Part":
        """Its elements `first` to `last`, counted from its own start."""
        return Part(self.name, self.dtype, self.shape, self.start + first, self.start + last)


def whole(name: str, dtype: torch.dtype, shape: tuple[int, ...]) -> Part:
    """A tensor as the one part of itself."""
    return Part(name, dtype, shape, 0, math.prod(shape))
