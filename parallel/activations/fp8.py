"""Activations stored in FP8, computed with in bfloat16 (K2 report, arXiv 2507.20534, section 2.4.3).

Kimi K2 keeps the inputs of MoE up-projections and of SwiGLU as FP8-E4M3, in tiles of 1x128 with float32 scales,
and does not compute in FP8. `compress` and `decompress` are that format, exactly:

**Tile.** 128 neighbours along the last dimension; the last tile of a row may be shorter. A tile has one scale,
found from its finite elements.

**Scale.** s, in float32, is the least power of two with amax <= 448 s, kept within 2^-116 .. 2^119. 448 is the
largest E4M3. The report leaves open how scales are rounded. Powers of two are what DeepSeek-V3 takes for the inputs
of MoE up-projections (arXiv 2412.19437, section 3.3.3), and they make everything but one rounding exact:

- x / s, and the way back, have no error of their own in float32 or bfloat16. So multiplication by 1/s is
  division, a fused multiply-add is a multiply and an add, and every device gives the same bits.
- What went through once goes through again unchanged: decompress(compress(y)) is y, bit for bit, if y came out
  of `decompress`. (Codes may differ: a tile whose largest code was 224 is stored as 448 of half the scale.)
- It costs at most one of the 15 powers of two that a tile spans with full precision, or the 18 with some.

**Value.** x / s to the nearest E4M3, ties to the even code, saturating at 448. Zeros, and what rounds to zero,
keep their sign.

**Not finite.** Inf, -Inf and NaN become NaN (code 0x7f), which comes back as NaN (0x7fc00000 or 0x7fc0). Other
elements of the tile are not touched by it. So no fault is hidden from who looks for it, and none is spread.

**Error.** For s > 2^-116, |y - x| <= 2^-4 max(|x|, 2^-6 s): half a step of 3 mantissa bits above the smallest
normal E4M3, half a step of subnormals below. As s < amax / 224, the second term is below amax / 229376. The
bounds of s are where this bends:

- s = 2^-116 (amax below 448 * 2^-116 = 5.4e-33, zero included): the same bound, whose second term, 2^-126, is the
  smallest normal float32. Subnormals among the inputs come back as zeros whatever a device does with them, and
  no output is subnormal.
- s = 2^119: elements above 448 * 2^119, 7/8 of the largest float32, saturate; they lose less than an eighth.

Shapes: a tensor of any leading shape is stored as `rows`, their product, times `hidden`, its last dimension.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

TILE = 128
"""Elements that share a scale, along the last dimension."""
LARGEST = 448.0
"""The largest number of E4M3 (float8_e4m3fn): 1.75 * 2^8."""
EXPONENT_BIAS = 127
"""Of float32's exponent field."""
SMALLEST_EXPONENT, LARGEST_EXPONENT = -116, 119
"""Of a scale, as a power of two; why these, see above under "Error"."""
TO_NEXT_EXPONENT = 0x1FFFFF
"""Added to the bits of a float32, it carries into the exponent where the mantissa is above 1.75."""


@dataclass(frozen=True, slots=True)
class Fp8Tensor:
    """A tensor as `compress` stores it. Only `compress` makes one."""

    values: Tensor
    """float8_e4m3fn [rows, hidden]: elements divided by their tile's scale."""
    scales: Tensor
    """float32 [rows, ceil(hidden / 128)]: powers of two."""
    shape: torch.Size
    """What `decompress` gives back: [..., hidden], of which the leading dimensions multiply to rows."""
    dtype: torch.dtype
    """What `decompress` gives back: float32 or bfloat16."""


def stored_bytes(shape: Sequence[int]) -> int:
    """Bytes that a tensor [..., hidden] takes when stored: one an element, four a tile. A scalar has none."""
    *leading, hidden = shape
    return math.prod(leading) * (hidden + 4 * -(-hidden // TILE))


def compress(tensor: Tensor) -> Fp8Tensor:
    """Store a tensor. Nothing is recorded for autograd, and the tensor is left as it is.

    CUDA tensors take the Triton kernels, CPU tensors their twin in torch; both give the same bits.

    Args:
        tensor: float32 or bfloat16 [..., hidden], of any strides; empty ones too.

    Raises:
        TypeError: for any other dtype.
        ValueError: for a scalar, and on any device but CUDA and the CPU.
    """
    if tensor.dtype not in (torch.float32, torch.bfloat16):
        raise TypeError(
            f"a tensor of {tensor.dtype} is to be stored in FP8, which is written for float32 and bfloat16: "
            "convert it, or keep it as it is"
        )
    if not tensor.dim():
        raise ValueError("a scalar is to be stored in FP8, which needs a last dimension to tile: keep it as it is")
    hidden = tensor.shape[-1]
    rows = tensor.detach().reshape(math.prod(tensor.shape[:-1]), hidden)
    if _on_cuda(tensor):
        # Where there is no CUDA device, Triton need not be there either.
        from parallel.activations import fp8_triton

        values, scales = fp8_triton.compress_rows(rows)
    else:
        values, scales = _compress_rows(rows)
    return Fp8Tensor(values, scales, tensor.shape, tensor.dtype)


def decompress(stored: Fp8Tensor) -> Tensor:
    """A new, contiguous tensor of the shape and dtype that was stored, on the device where it is stored.

    Raises:
        ValueError: on any device but CUDA and the CPU.
    """
    if _on_cuda(stored.values):
        from parallel.activations import fp8_triton

        rows = fp8_triton.decompress_rows(stored.values, stored.scales, stored.dtype)
    else:
        rows = _decompress_rows(stored.values, stored.scales, stored.dtype)
    return rows.view(stored.shape)


def _on_cuda(tensor: Tensor) -> bool:
    """Whether the kernels are to be used, or the twin."""
    kind = tensor.device.type
    if kind not in ("cuda", "cpu"):
        raise ValueError(f"FP8 storage is written for cuda and cpu tensors, this one is on {kind}: move it")
    return kind == "cuda"


def _tiled(rows: Tensor) -> Tensor:
    """[rows, hidden] to [rows, tiles, 128], filled up with zeros."""
    num_rows, hidden = rows.shape
    num_tiles = -(-hidden // TILE)
    return F.pad(rows, (0, num_tiles * TILE - hidden)).view(num_rows, num_tiles, TILE)


def _compress_rows(rows: Tensor) -> tuple[Tensor, Tensor]:
    """The twin of `fp8_triton.compress_rows`: values and scales of float32 or bfloat16 [rows, hidden]."""
    tiles = _tiled(rows.float())
    finite = tiles.isfinite()
    amax = torch.where(finite, tiles, 0).abs().amax(-1, keepdim=True)
    # On the bits: logarithms are rounded, and frexp of a subnormal depends on the device's mode.
    exponent = ((amax.view(torch.int32) + TO_NEXT_EXPONENT) >> 23) - EXPONENT_BIAS - 8
    exponent = exponent.clamp(SMALLEST_EXPONENT, LARGEST_EXPONENT)
    scales, inverse = (
        ((EXPONENT_BIAS + power) << 23).view(torch.float32) for power in (exponent, -exponent)
    )
    # Beyond the largest number torch gives NaN, so saturation comes first.
    values = (tiles * inverse).clamp(-LARGEST, LARGEST)
    values = torch.where(finite, values, torch.nan).flatten(1)[:, : rows.shape[1]]
    return values.to(torch.float8_e4m3fn), scales.squeeze(-1)


def _decompress_rows(values: Tensor, scales: Tensor, dtype: torch.dtype) -> Tensor:
    """The twin of `fp8_triton.decompress_rows`: [rows, hidden] of `dtype`."""
    rows = (_tiled(values.float()) * scales[..., None]).flatten(1)[:, : values.shape[1]].to(dtype)
    # Which NaN comes out of a product or a conversion is the device's choice.
    return rows.masked_fill(rows.isnan(), torch.nan).contiguous()
