"""Number formats that released weights come in, read piece by piece as plain numbers.

- Plain: BF16, F16 or F32.
- FP8: E4M3 with a float32 scale for each block of 128 x 128, `NAME_scale_inv`; a weight is code times scale.
  As in DeepSeek-V3 and Kimi-K2 (`weight_dequant` of DeepSeek's inference code; `weight_block_size`).
- INT4: `NAME_packed` int32, eight codes each, code i in bits 4i to 4i+3, stored as code + 8; `NAME_scale`
  bfloat16, one per group of 32 in a row; `NAME_shape`, the weight's shape. As in Kimi-K2-Thinking and K2.5
  (compressed-tensors, `pack-quantized`, symmetric; `k25_train/int4.py`).

Products are taken in float32: a code of 4 bits times 8 bits of a bfloat16 mantissa is exact there.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from enum import Enum

import torch
from torch import Tensor

from k25_train.convert.hf_files import StoredTensor, read_bytes
from k25_train.errors import CheckpointError
from k25_train.int4 import CODES_PER_WORD, GROUP_SIZE, Int4Weight, dequantize

FP8_BLOCK = 128
"""Rows and columns that share a scale."""
DTYPES = {
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F8_E4M3": torch.float8_e4m3fn,
    "I64": torch.int64,
    "I32": torch.int32,
}
PLAIN = ("F32", "F16", "BF16")
"""What is read as it is."""
BYTES_PER_ELEMENT = 16
"""Most memory that an element takes while it is read, scaled and rounded: codes, codes and products in
float32, one temporary, and the result. A test measures it."""


class NumberFormat(Enum):
    """How a weight is stored."""

    plain = "plain"
    """As numbers."""
    fp8 = "FP8 128x128"
    """E4M3 with scales of blocks."""
    int4 = "INT4 group 32"
    """Packed, with scales of groups."""


@dataclass(frozen=True, slots=True)
class SourceTensor:
    """A weight of the folder, in whichever format."""

    name: str
    """Without what its format appends."""
    shape: tuple[int, ...]
    """Of the weight."""
    format: NumberFormat
    """How it is stored."""
    codes: StoredTensor
    """Its numbers, or codes."""
    scales: StoredTensor | None = None
    """Factors of the codes; None for plain ones."""
    shape_tensor: StoredTensor | None = None
    """Where an INT4 weight's shape is said once more."""

    @property
    def numel(self) -> int:
        """Elements of the weight."""
        size = 1
        for length in self.shape:
            size *= length
        return size

    @property
    def row_numel(self) -> int:
        """Elements of which a whole number is read at a time: rows share scales with nothing before them."""
        return 1 if self.format is NumberFormat.plain else self.shape[-1]

    @property
    def stored(self) -> tuple[StoredTensor, ...]:
        """All tensors of the files that it is made of."""
        return tuple(each for each in (self.codes, self.scales, self.shape_tensor) if each is not None)

    @property
    def dtype(self) -> str:
        """Name of its number format for people."""
        return self.codes.dtype if self.format is NumberFormat.plain else self.format.value


def find_weights(tensors: Mapping[str, StoredTensor]) -> dict[str, SourceTensor]:
    """The weights that the tensors of a folder make, in their order; by name.

    Raises CheckpointError for scales that are missing or do not fit, and for formats that are not read.
    """
    found: dict[str, SourceTensor] = {}
    used: set[str] = set()
    for name, tensor in tensors.items():
        if name.endswith("_packed"):
            weight = _int4(name.removesuffix("_packed"), tensor, tensors)
        elif tensor.dtype == "F8_E4M3":
            weight = _fp8(name, tensor, tensors)
        else:
            continue
        found[weight.name] = weight
        used.update(each.name for each in weight.stored)
    weights: dict[str, SourceTensor] = {}
    by_codes = {weight.codes.name: weight for weight in found.values()}
    for name, tensor in tensors.items():
        if name in by_codes:
            weight = by_codes[name]
            if weight.name in tensors and weight.name != name:
                raise CheckpointError(
                    f"{tensor.path}: {weight.name} is there both packed and as it is: which counts is not "
                    "known; take one out of the folder"
                )
            weights[weight.name] = weight
        elif name not in used:
            weights[name] = SourceTensor(name, tensor.shape, NumberFormat.plain, tensor)
    return weights


def check_readable(weight: SourceTensor) -> None:
    """Raises CheckpointError for a plain tensor of a dtype that weights do not have."""
    if weight.format is NumberFormat.plain and weight.codes.dtype not in PLAIN:
        raise CheckpointError(
            f"{weight.codes.path}: {weight.name} is {weight.codes.dtype}, but weights are read as BF16, F16, "
            "F32, FP8 E4M3 with weight_scale_inv, or INT4 in groups of 32; convert it first"
        )


def read(weight: SourceTensor, start: int, stop: int) -> Tensor:
    """Elements `start` to `stop` of the flattened weight, 1-D; float32, or the dtype of a plain weight.

    Both must be multiples of `row_numel`. Raises CheckpointError for numbers or scales that are not finite,
    and for an INT4 weight that says to have another shape.
    """
    if weight.format is NumberFormat.plain:
        values = _read(weight.codes, start, stop)
    else:
        columns = weight.shape[-1]
        first, last = start // columns, stop // columns
        values = (_read_fp8 if weight.format is NumberFormat.fp8 else _read_int4)(weight, first, last)
    if not is_finite(values):
        raise CheckpointError(
            f"{weight.codes.path}: {weight.name} holds numbers that are not finite (elements {start:,} to "
            f"{stop:,}); the file is damaged, or its model had failed"
        )
    return values


def check_shape(weight: SourceTensor) -> None:
    """Compare an INT4 weight's shape with the one stored with it. Raises CheckpointError."""
    if weight.shape_tensor is None:
        return
    said = tuple(_read(weight.shape_tensor, 0, weight.shape_tensor.numel).tolist())
    if said != weight.shape:
        raise CheckpointError(
            f"{weight.codes.path}: {weight.shape_tensor.name} says {list(said)}, but codes and scales are "
            f"those of {list(weight.shape)}"
        )


def _fp8(name: str, codes: StoredTensor, tensors: Mapping[str, StoredTensor]) -> SourceTensor:
    scales = tensors.get(f"{name}_scale_inv")
    if scales is None:
        raise CheckpointError(f"{codes.path}: {name} is FP8, but its scales {name}_scale_inv are missing")
    blocks = tuple(-(-length // FP8_BLOCK) for length in codes.shape)
    if len(codes.shape) != 2 or scales.shape != blocks or scales.dtype not in PLAIN:
        raise CheckpointError(
            f"{scales.path}: {scales} does not fit {name} {list(codes.shape)}: blocks of {FP8_BLOCK} x "
            f"{FP8_BLOCK} have scales {list(blocks)}"
        )
    return SourceTensor(name, codes.shape, NumberFormat.fp8, codes, scales)


def _int4(name: str, codes: StoredTensor, tensors: Mapping[str, StoredTensor]) -> SourceTensor:
    scales, shape = tensors.get(f"{name}_scale"), tensors.get(f"{name}_shape")
    if scales is None or shape is None:
        missing = f"{name}_scale" if scales is None else f"{name}_shape"
        raise CheckpointError(f"{codes.path}: {codes.name} has no {missing}: it is missing")
    if codes.dtype != "I32" or len(codes.shape) != 2 or scales.dtype not in PLAIN:
        raise CheckpointError(f"{codes.path}: {codes} with {scales}: codes are a matrix of I32, scales BF16")
    columns = codes.shape[1] * CODES_PER_WORD
    expected = (codes.shape[0], columns // GROUP_SIZE)
    if columns % GROUP_SIZE or scales.shape != expected:
        raise CheckpointError(
            f"{scales.path}: {scales} does not fit {codes.name} {list(codes.shape)}: groups of {GROUP_SIZE} "
            f"have scales {list(expected)}; other groups are not read"
        )
    if shape.shape != (2,) or shape.dtype not in ("I32", "I64"):
        raise CheckpointError(f"{shape.path}: {shape} must be two integers, the shape of {name}")
    return SourceTensor(name, (codes.shape[0], columns), NumberFormat.int4, codes, scales, shape)


def _read(stored: StoredTensor, start: int, stop: int) -> Tensor:
    dtype = DTYPES[stored.dtype]
    data = read_bytes(stored.path, stored.offset + start * dtype.itemsize, (stop - start) * dtype.itemsize)
    return torch.from_numpy(data).view(dtype)


def _read_fp8(weight: SourceTensor, first: int, last: int) -> Tensor:
    columns = weight.shape[1]
    codes = _read(weight.codes, first * columns, last * columns).view(last - first, columns)
    values = codes.to(torch.float32)
    top, bottom = first // FP8_BLOCK, -(-last // FP8_BLOCK)
    scales = _scales(weight, top, bottom).repeat_interleave(FP8_BLOCK, dim=1)[:, :columns]
    for block in range(top, bottom):
        rows = slice(max(block * FP8_BLOCK, first) - first, min((block + 1) * FP8_BLOCK, last) - first)
        values[rows] *= scales[block - top]
    return values.flatten()


def _read_int4(weight: SourceTensor, first: int, last: int) -> Tensor:
    words = weight.codes.shape[1]
    packed = _read(weight.codes, first * words, last * words).view(last - first, words)
    return dequantize(Int4Weight(packed, _scales(weight, first, last)), torch.float32).flatten()


def _scales(weight: SourceTensor, first: int, last: int) -> Tensor:
    """Rows of the scales, float32."""
    assert weight.scales is not None
    width = weight.scales.shape[1]
    scales = _read(weight.scales, first * width, last * width).view(last - first, width).to(torch.float32)
    if not is_finite(scales):
        raise CheckpointError(
            f"{weight.scales.path}: {weight.scales.name} has a scale that is not finite; copy the file again"
        )
    return scales


def is_finite(values: Tensor) -> bool:
    """Whether no number is NaN or infinite, without a mask of them: the extremes are NaN if one is."""
    low, high = torch.aminmax(values) if values.numel() else (torch.zeros(()), torch.zeros(()))
    return bool(torch.isfinite(low) & torch.isfinite(high))
