"""The format of `fp8.py` on CUDA: one pass over memory per direction, with the twin's bits.

The conversion between float32 and E4M3 is integer arithmetic on bit patterns, which is the same on every GPU
that Triton supports and in Triton's interpreter, which verifies the kernels on the CPU. The interpreter's
built-in conversion would verify nothing: it ignores ties, loses carries, and reads NaN as 480.

E4M3 has a sign, 4 bits of exponent with bias 7, and 3 bits of mantissa. So above its subnormals, the code is
a float32 shifted right by 20 bits, with its exponent reduced by 127 - 7 = 120. Its subnormals are multiples
of 2^-9, which is the spacing of float32 numbers from 2^14 on: adding 2^14 leaves the multiple, rounded to
nearest even by the adder, in the last bits.

Three things in float arithmetic differ between devices. Division in Triton is approximate unless it is
`div_rn`. A product and that sum would be fused, which rounds once instead of twice: kernels are compiled
without fusion. Subnormals may be flushed: the format has none.

A program processes a block of rows x tiles: the tiles of a block are one dimension, a tile's 128 elements the
other, and a tile is reduced in registers. The kernels' integers are annotated as tensors, which they are:
annotated as `int`, Triton would truncate them to 32 bits.
"""

import torch
import triton
from torch import Tensor
from triton import language as tl

from parallel.activations.fp8_format import LARGEST
from parallel.activations.sizes import TILE

COMPILE_OPTIONS = {"enable_fp_fusion": False}
"""Options that both kernels must be compiled with, see above."""

_TILE = tl.constexpr(TILE)
_BLOCK_ROWS = tl.constexpr(8)
_BLOCK_TILES = tl.constexpr(4)
_LARGEST = tl.constexpr(LARGEST)
_SMALLEST_AMAX_BITS = tl.constexpr(0x09E00000)
"""Bits of `fp8_format.SMALLEST_AMAX`, 1.75 * 2^-108."""
_MAGNITUDE = tl.constexpr(0x7FFFFFFF)
"""All bits of a float32 except its sign."""
_INFINITY = tl.constexpr(0x7F800000)
"""Bits of float32's infinity; NaNs have larger magnitudes."""
_NAN = tl.constexpr(0x7FC00000)
_SUBNORMAL_STEPS = tl.constexpr(16384.0)
"""2^14, whose neighbours are 2^-9 apart, see above."""
_SUBNORMAL_STEPS_BITS = tl.constexpr(0x46800000)
_REBIAS = tl.constexpr(120 << 3)
"""Difference between the exponents of float32 and E4M3, in units of a code."""
_SMALLEST_NORMAL = tl.constexpr(2.0**-6)
_CODE_LARGEST, _CODE_NAN = tl.constexpr(0x7E), tl.constexpr(0x7F)


@triton.jit
def _block(num_rows: tl.tensor, hidden: tl.tensor) -> tuple[tl.tensor, ...]:
    """This program's tiles: row and index in the row [tiles]; elements' columns and masks [tiles, 128]."""
    index = tl.arange(0, _BLOCK_ROWS * _BLOCK_TILES)
    row = tl.program_id(0) * _BLOCK_ROWS + index // _BLOCK_TILES
    tile = tl.program_id(1) * _BLOCK_TILES + index % _BLOCK_TILES
    column = (tile * _TILE)[:, None] + tl.arange(0, _TILE)[None, :]
    exists = (row < num_rows)[:, None] & (column < hidden)
    # Offsets of elements exceed 32 bits; rows and columns do not.
    return row.to(tl.int64), tile, column, exists


@triton.jit
def _encode(scaled: tl.tensor) -> tl.tensor:
    """E4M3 codes, int32, of finite, non-negative float32 numbers."""
    bits = scaled.to(tl.int32, bitcast=True)
    even = (bits >> 20) & 1
    normal = ((bits + 0x7FFFF + even) >> 20) - _REBIAS
    subnormal = (scaled + _SUBNORMAL_STEPS).to(tl.int32, bitcast=True) - _SUBNORMAL_STEPS_BITS
    return tl.where(scaled < _SMALLEST_NORMAL, subnormal, tl.minimum(normal, _CODE_LARGEST))


@triton.jit
def _decode(code: tl.tensor) -> tl.tensor:
    """float32 numbers of E4M3 codes, int32, without sign and NaN."""
    normal = ((code + _REBIAS) << 20).to(tl.float32, bitcast=True)
    subnormal = (code + _SUBNORMAL_STEPS_BITS).to(tl.float32, bitcast=True) - _SUBNORMAL_STEPS
    return tl.where(code < 8, subnormal, normal)


@triton.jit
def _compress_kernel(
    words: tl.tensor,
    codes: tl.tensor,
    scales: tl.tensor,
    num_rows: tl.tensor,
    num_tiles: tl.tensor,
    hidden: tl.tensor,
    row_stride: tl.tensor,
    is_bfloat16: tl.constexpr,
) -> None:
    """Words (int16 or int32 [num_rows, hidden], with a stride between rows) to codes (uint8) and scales."""
    # 1. Load, as bits of float32.
    row, tile, column, exists = _block(num_rows, hidden)
    bits = tl.load(words + (row * row_stride)[:, None] + column, mask=exists, other=0).to(tl.int32)
    if is_bfloat16:
        bits = bits << 16
    # 2. The tile's largest finite magnitude.
    magnitude = bits & _MAGNITUDE
    finite = magnitude < _INFINITY
    magnitude = tl.where(finite, magnitude, 0)
    # Non-negative floats are ordered like their bits.
    amax = tl.maximum(tl.max(magnitude, axis=1), _SMALLEST_AMAX_BITS).to(tl.float32, bitcast=True)
    # 3. Scale, encode, put the sign back.
    largest = tl.full(amax.shape, _LARGEST, tl.float32)
    inverse = tl.div_rn(largest, amax)
    code = _encode(magnitude.to(tl.float32, bitcast=True) * inverse[:, None])
    code = tl.where(finite, code | ((bits >> 24) & 0x80), _CODE_NAN)
    tl.store(codes + (row * hidden)[:, None] + column, code.to(tl.uint8), mask=exists)
    has_scale = (row < num_rows) & (tile < num_tiles)
    tl.store(scales + row * num_tiles + tile, tl.div_rn(amax, largest), mask=has_scale)


@triton.jit
def _decompress_kernel(
    codes: tl.tensor,
    scales: tl.tensor,
    words: tl.tensor,
    num_rows: tl.tensor,
    num_tiles: tl.tensor,
    hidden: tl.tensor,
    is_bfloat16: tl.constexpr,
) -> None:
    """Codes (uint8) and scales to words (int16 or int32), all contiguous."""
    # 1. Load codes, and their tiles' scales.
    row, tile, column, exists = _block(num_rows, hidden)
    offset = (row * hidden)[:, None] + column
    code = tl.load(codes + offset, mask=exists, other=0).to(tl.int32)
    has_scale = (row < num_rows) & (tile < num_tiles)
    scale = tl.load(scales + row * num_tiles + tile, mask=has_scale, other=1.0)
    # 2. Decode without the sign, scale, put sign and NaN back.
    value = _decode(code & 0x7F) * scale[:, None]
    bits = value.to(tl.int32, bitcast=True) | ((code & 0x80) << 24)
    bits = tl.where((code & 0x7F) == _CODE_NAN, _NAN, bits)
    if is_bfloat16:
        # Round to nearest even: no finite number is large enough to become infinity, and NaN stays NaN.
        bits = bits + 0x7FFF + ((bits >> 16) & 1)
        tl.store(words + offset, (bits >> 16).to(tl.int16), mask=exists)
    else:
        tl.store(words + offset, bits, mask=exists)


def _words(rows: Tensor) -> Tensor:
    """The same memory as integers, which neither Triton nor its interpreter converts."""
    return rows.view(torch.int16 if rows.dtype == torch.bfloat16 else torch.int32)


def _grid(num_rows: int, num_tiles: int) -> tuple[int, int]:
    """Numbers of programs along rows and tiles; 0 for an empty tensor."""
    return triton.cdiv(num_rows, _BLOCK_ROWS.value), triton.cdiv(num_tiles, _BLOCK_TILES.value)


def compress_rows(rows: Tensor) -> tuple[Tensor, Tensor]:
    """Values (float8_e4m3fn [rows, hidden]) and scales (float32 [rows, tiles]) of float32 or bfloat16 rows.

    Rows may have gaps, as in one half of a fused projection's output; if elements have gaps, they are copied.
    """
    num_rows, hidden = rows.shape
    num_tiles = triton.cdiv(hidden, TILE)
    if rows.stride(1) != 1:
        rows = rows.contiguous()
    values = torch.empty(num_rows, hidden, dtype=torch.float8_e4m3fn, device=rows.device)
    scales = torch.empty(num_rows, num_tiles, dtype=torch.float32, device=rows.device)
    if rows.numel():
        # Triton launches on the current device, which may not be the tensor's.
        with torch.cuda.device_of(rows):
            _compress_kernel[_grid(num_rows, num_tiles)](
                _words(rows),
                values.view(torch.uint8),
                scales,
                num_rows,
                num_tiles,
                hidden,
                rows.stride(0),
                is_bfloat16=rows.dtype == torch.bfloat16,
                **COMPILE_OPTIONS,
            )
    return values, scales


def decompress_rows(values: Tensor, scales: Tensor, dtype: torch.dtype) -> Tensor:
    """Rows [rows, hidden] of `dtype`, float32 or bfloat16, from the output of `compress_rows`."""
    num_rows, hidden = values.shape
    num_tiles = scales.shape[1]
    rows = torch.empty(num_rows, hidden, dtype=dtype, device=values.device)
    if rows.numel():
        with torch.cuda.device_of(rows):
            _decompress_kernel[_grid(num_rows, num_tiles)](
                values.view(torch.uint8),
                scales,
                _words(rows),
                num_rows,
                num_tiles,
                hidden,
                is_bfloat16=dtype == torch.bfloat16,
                **COMPILE_OPTIONS,
            )
    return rows
