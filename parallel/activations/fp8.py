"""Activations stored in FP8 and computed with in bfloat16 (K2 report, arXiv 2507.20534, section 2.4.3).

Kimi K2 keeps the inputs of MoE up-projections and of SwiGLU as FP8-E4M3, in tiles of 1x128 with float32
scales, and does not compute in FP8. `compress` and `decompress` implement that format, bit by bit as follows:

**Tile.** 128 neighbours along the last dimension; the last tile of a row may be shorter. A tile has one
scale, computed from the largest magnitude of its finite elements, amax.

**Arithmetic.** a = max(amax, 448 * 2^-116), in float32, where 448 is the largest E4M3 value. All operations
are float32's, each rounded to nearest even:

    scale = a / 448                       value = E4M3(x * (448 / a))                back = value * scale

E4M3() rounds to nearest, ties to the even code, and saturates at 448. `back` is rounded once more if the
tensor is bfloat16. Zeros, and values rounded to zero, keep their sign.

**Not finite.** Inf, -Inf and NaN become NaN (code 0x7f), which is restored as NaN (0x7fc00000 or 0x7fc0).
They do not affect other elements of the tile. So no fault is hidden from those who look for it, and none is
spread.

**Error.** |back - x| <= 2^-4 max(|x|, 2^-6 scale) + u |back|: half a step of 3 mantissa bits above E4M3's
smallest normal number, half a step of its subnormals below; u is 2^-21 in float32 and 2^-8 in bfloat16, for
all other roundings. Except in small tiles, 2^-10 scale is under amax / 400000, and the largest element is
restored exactly in bfloat16, and within an ulp in float32. A finite tensor is restored finite.

**Small tiles.** An amax below 448 * 2^-116 = 5.4e-33, zero included, has the scale 2^-116. This bound keeps
subnormal float32 numbers out: those of the input are restored as zeros, whether a device flushes them or not,
and no scale, no 448 / a and no result is subnormal.

**Idempotence.** In bfloat16, the output of `decompress` passes through again unchanged: same codes, scales
and numbers. In float32 the codes are the same, but some scales are an ulp off, since 448 (a / 448) is not
always a.

Scales that are powers of two would not round, but would lose what outliers gain: with amax / 448, the largest
element of a tile is exact, and it has most of the weight (tests/unit/activations/test_fp8.py).

Shapes: a tensor of any leading shape is stored as `rows`, their product, times `hidden`, its last dimension.
"""

import math
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from parallel.activations.fp8_format import LARGEST, SMALLEST_AMAX
from parallel.activations.sizes import TILE


@dataclass(frozen=True, slots=True)
class Fp8Tensor:
    """A tensor as stored by `compress`, the only place that makes one."""

    values: Tensor
    """Elements divided by their tile's scale, float8_e4m3fn [rows, hidden]."""
    scales: Tensor
    """Factor of each tile's values, float32 [rows, ceil(hidden / 128)]."""
    shape: torch.Size
    """Shape of the tensor: [..., hidden], whose leading dimensions multiply to rows."""
    dtype: torch.dtype
    """Dtype of the tensor: float32 or bfloat16."""


def compress(tensor: Tensor) -> Fp8Tensor:
    """Store a tensor. Nothing is recorded for autograd, and the tensor is not changed.

    CUDA tensors use the Triton kernels, CPU tensors their twin in torch; both give the same bits.

    Args:
        tensor: float32 or bfloat16 [..., hidden], with any strides; may be empty.

    Raises:
        TypeError: for any other dtype.
        ValueError: for a scalar, and on devices other than CUDA and the CPU.
    """
    if tensor.dtype not in (torch.float32, torch.bfloat16):
        raise TypeError(
            f"a tensor of {tensor.dtype} cannot be stored in FP8, which supports float32 and bfloat16: "
            "convert it, or keep it unchanged"
        )
    if not tensor.dim():
        raise ValueError(
            "a scalar cannot be stored in FP8, which needs a last dimension to tile: keep it unchanged"
        )
    # Leading dimensions do not matter: tiles are along the last one.
    hidden = tensor.shape[-1]
    rows = tensor.detach().reshape(math.prod(tensor.shape[:-1]), hidden)
    if _on_cuda(tensor):
        # Triton need not be installed where there is no CUDA device.
        from parallel.activations import fp8_triton

        values, scales = fp8_triton.compress_rows(rows)
    else:
        values, scales = _compress_rows(rows)
    return Fp8Tensor(values, scales, tensor.shape, tensor.dtype)


def decompress(stored: Fp8Tensor) -> Tensor:
    """A new, contiguous tensor of the stored shape and dtype, on the device where it is stored.

    Raises:
        ValueError: on devices other than CUDA and the CPU.
    """
    if _on_cuda(stored.values):
        from parallel.activations import fp8_triton

        rows = fp8_triton.decompress_rows(stored.values, stored.scales, stored.dtype)
    else:
        rows = _decompress_rows(stored.values, stored.scales, stored.dtype)
    return rows.view(stored.shape)


def _on_cuda(tensor: Tensor) -> bool:
    """Whether to use the kernels, or else the twin."""
    kind = tensor.device.type
    if kind not in ("cuda", "cpu"):
        raise ValueError(f"FP8 storage supports cuda and cpu tensors, this one is on {kind}: move it")
    return kind == "cuda"


def _tiled(rows: Tensor) -> Tensor:
    """[rows, hidden] -> [rows, tiles, 128], padded with zeros."""
    num_rows, hidden = rows.shape
    num_tiles = -(-hidden // TILE)
    return F.pad(rows, (0, num_tiles * TILE - hidden)).view(num_rows, num_tiles, TILE)


def _compress_rows(rows: Tensor) -> tuple[Tensor, Tensor]:
    """The twin of `fp8_triton.compress_rows`: values and scales of float32 or bfloat16 [rows, hidden]."""
    # Scales ignore what is not finite.
    tiles = _tiled(rows.float())
    finite = tiles.isfinite()
    amax = torch.where(finite, tiles, 0).abs().amax(-1, keepdim=True)
    amax = amax.clamp(min=SMALLEST_AMAX)
    largest = torch.full_like(amax, LARGEST)
    # torch computes number / tensor as number * reciprocal(tensor), which rounds twice.
    values = tiles * (largest / amax)
    # Beyond the largest number torch gives NaN, so saturation comes first.
    values = torch.where(finite, values.clamp(-LARGEST, LARGEST), torch.nan)
    values = values.flatten(1)[:, : rows.shape[1]].to(torch.float8_e4m3fn)
    return values, (amax / largest).squeeze(-1)


def _decompress_rows(values: Tensor, scales: Tensor, dtype: torch.dtype) -> Tensor:
    """The twin of `fp8_triton.decompress_rows`: [rows, hidden] of `dtype`."""
    rows = (_tiled(values.float()) * scales[..., None]).flatten(1)[:, : values.shape[1]].to(dtype)
    # Which NaN a product or a conversion returns depends on the device.
    return rows.masked_fill(rows.isnan(), torch.nan).contiguous()
