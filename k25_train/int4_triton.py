"""`int4.fake_quantize` on CUDA: one pass over memory, with the twin's bits.

A program takes groups of 32 weights, each reduced in registers. As in `parallel/activations/fp8_triton.py`:
numbers travel as integers, which Triton's interpreter verifies on the CPU; division is `div_rn`; nothing is
fused. Rounding to bfloat16 is integer arithmetic, and so is the step to a neighbouring scale. Codes are
rounded by adding 1.5 · 2^23, whose neighbours are 1 apart: quotients are 10 at most.

Source: our choice. A kernel for each operation instead would move 30 times the bytes, while the stages of a
pipeline wait for one another.
"""

import torch
import triton
from torch import Tensor
from triton import language as tl

from k25_train.config.model import INT4_GROUP

COMPILE_OPTIONS = {"enable_fp_fusion": False}
"""Options that the kernel must be compiled with, see above."""

_GROUP = tl.constexpr(INT4_GROUP)
_GROUPS = tl.constexpr(64)
"""Groups of a program."""
_LARGEST = tl.constexpr(7.0)
_UNITS = tl.constexpr(12582912.0)
"""1.5 * 2^23."""
_STEP = tl.constexpr(1 << 16)
"""Distance, as float32 bits, of a bfloat16 from the next one."""
_TO_BF16 = tl.constexpr(-65536)
"""Bits of float32 that bfloat16 has."""


@triton.jit
def _bf16(values: tl.tensor) -> tl.tensor:
    """float32 rounded to bfloat16, to nearest even; what is not finite stays so."""
    bits = values.to(tl.int32, bitcast=True)
    rounded = (bits + 0x7FFF + ((bits >> 16) & 1)) & _TO_BF16
    # The bits of a NaN may be all ones, to which nothing can be added.
    return tl.where(values == values, rounded.to(tl.float32, bitcast=True), values)


@triton.jit
def _rounded(groups: tl.tensor, scale: tl.tensor) -> tl.tensor:
    """code times scale, rounded to bfloat16; of groups [..., 32] and their scales."""
    divisor = tl.where(scale == 0, 1.0, scale)[:, None]
    codes = (tl.div_rn(groups, tl.broadcast_to(divisor, groups.shape)) + _UNITS) - _UNITS
    codes = tl.where(codes > _LARGEST, _LARGEST, tl.where(codes < -_LARGEST, -_LARGEST, codes))
    return _bf16(tl.where((scale == 0)[:, None], 0.0, codes) * scale[:, None])


@triton.jit
def _neighbour(scale: tl.tensor, step: tl.constexpr) -> tl.tensor:
    """The next bfloat16 in this direction of one that is not negative."""
    bits = scale.to(tl.int32, bitcast=True) + step
    return tl.maximum(bits, 0).to(tl.float32, bitcast=True)


@triton.jit
def _fake_quantize_kernel(
    words: tl.tensor, results: tl.tensor, num_groups: tl.tensor, is_bfloat16: tl.constexpr
) -> None:
    """Words (int16 or int32 [num_groups, 32]) to results of the same form, both contiguous."""
    # 1. Load, as float32 rounded to bfloat16.
    group = tl.program_id(0).to(tl.int64) * _GROUPS + tl.arange(0, _GROUPS)
    offset = group[:, None] * _GROUP + tl.arange(0, _GROUP)[None, :]
    exists = (group < num_groups)[:, None] & (tl.arange(0, _GROUP) >= 0)[None, :]
    bits = tl.load(words + offset, mask=exists, other=0).to(tl.int32)
    if is_bfloat16:
        bits = bits << 16
    groups = _bf16(bits.to(tl.float32, bitcast=True))
    # 2. The scale by the rule, and the neighbour that a dequantised group may have had.
    amax = tl.max(tl.abs(groups), axis=1)
    scale = _bf16(tl.div_rn(amax, tl.full(amax.shape, _LARGEST, tl.float32)))
    below, above = _neighbour(scale, -_STEP), _neighbour(scale, _STEP)
    other = tl.where(_bf16(below * _LARGEST) == amax, below, scale)
    other = tl.where(_bf16(above * _LARGEST) == amax, above, other)
    # 3. Weights by the one, or by the other where that alone gives the group back.
    values, others = _rounded(groups, scale), _rounded(groups, other)
    misses = tl.sum((values != groups).to(tl.int32), axis=1)
    other_misses = tl.sum((others != groups).to(tl.int32), axis=1)
    values = tl.where(((other_misses == 0) & (misses > 0))[:, None], others, values)
    # 4. Store; the numbers are bfloat16's, so that nothing is left to round.
    bits = values.to(tl.int32, bitcast=True)
    if is_bfloat16:
        tl.store(results + offset, (bits >> 16).to(tl.int16), mask=exists)
    else:
        tl.store(results + offset, bits, mask=exists)


def fake_quantize_into(result: Tensor, weight: Tensor) -> None:
    """Fill `result` with what INT4 stands for; both contiguous, of one shape [..., in] and number format."""
    words = torch.int16 if weight.dtype == torch.bfloat16 else torch.int32
    num_groups = weight.numel() // INT4_GROUP
    if num_groups:
        # Triton launches on the current device, which may not be the tensor's.
        with torch.cuda.device_of(weight):
            _fake_quantize_kernel[(triton.cdiv(num_groups, _GROUPS.value),)](
                weight.view(words),
                result.view(words),
                num_groups,
                is_bfloat16=weight.dtype == torch.bfloat16,
                **COMPILE_OPTIONS,
            )
