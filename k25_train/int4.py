"""INT4 weights as the release stores them: groups of 32 along the inputs, each with a scale in bfloat16.

The rule (compressed-tensors' `pack-quantized`, symmetric, observer minmax; the scale is not disclosed by the
reports, this one gives the released bytes): scale = bfloat16(amax / 7), codes = round(w / scale) in float32
of the rounded scale, clamped to ±7; a group of zeros has scale 0 and codes 0. Eight codes make an int32: code
i is in the bits from 4i, stored as code + 8.

**There and back.** A weight that was dequantised to bfloat16 and has not changed since gives the same bytes
again, by `requantize`. The largest code of a group is 7 by the rule, but bfloat16(7 · scale) / 7 is not
always nearest to the scale: where the scale's significand (128 to 255) is 4 more than a multiple of 8 and at
least 147, a neighbour is nearer. bfloat16 weights never have such a scale; of those that were quantised from
float32, 11% do. Only the right one of the two gives every weight of the group back, so that one is taken.
Both do where a group has no other codes than 0 and ±7: then nothing in the weights tells them apart. Such a
group does not occur among weights that are spread over 32 inputs, but it does where all but one are 0. With
the released folder at hand, `keep_released` takes its bytes for every group that still has its weights,
whatever rule they were made by.

**In training** (`model.quantization=int4_qat`, `model/quantization.py`) the weights that experts compute with
are those that the bytes of an export stand for: `fake_quantize`, which shares every step of the arithmetic
with `requantize` and `dequantize` and never leaves the device.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from k25_train.config.model import INT4_GROUP
from k25_train.errors import CheckpointError

GROUP_SIZE = INT4_GROUP
MAX_CODE = 7
CODES_PER_WORD = 8
_OFFSET = 8
_PIECE_ELEMENTS = 2**22
"""Weights that the CPU fake-quantises at once: temporaries take some 30 bytes of each."""
_BF16_STEP = 1 << 16
"""Distance, as float32 bits, of a bfloat16 from the next one."""


@dataclass(frozen=True, slots=True)
class Int4Weight:
    """A matrix [out, in], or several [..., out, in], as the release stores it."""

    packed: Tensor
    """[..., out, in / 8] int32."""
    scale: Tensor
    """[..., out, in / 32] bfloat16."""

    @property
    def shape(self) -> tuple[int, ...]:
        """Shape of the weights, [..., out, in]."""
        return (*self.packed.shape[:-1], self.packed.shape[-1] * CODES_PER_WORD)

    def shape_tensor(self) -> Tensor:
        """[2] int32: what is stored as `weight_shape`."""
        return torch.tensor(self.shape[-2:], dtype=torch.int32)


def pack(codes: Tensor) -> Tensor:
    """Codes [..., in] of -8 to 7 in int8 -> int32 [..., in / 8]."""
    nibbles = (codes + _OFFSET).view(torch.uint8).unflatten(-1, (-1, 2))
    # The first of each pair of codes is the low half of a byte, and the first byte of an int32 its lowest.
    octets = nibbles[..., 0] | nibbles[..., 1] << 4
    return octets.contiguous().view(torch.int32)


def unpack(packed: Tensor) -> Tensor:
    """The inverse of `pack`: int32 [..., in / 8] -> codes [..., in] in int8."""
    octets = packed.contiguous().view(torch.uint8)
    nibbles = torch.stack((octets & 15, octets >> 4), dim=-1).flatten(-2)
    return nibbles.view(torch.int8) - _OFFSET


def dequantize(weight: Int4Weight, dtype: torch.dtype = torch.bfloat16) -> Tensor:
    """Weights [..., out, in]: code · scale, computed exactly and rounded once to `dtype`."""
    codes = unpack(weight.packed).unflatten(-1, (-1, GROUP_SIZE)).float()
    return (codes * weight.scale.float().unsqueeze(-1)).flatten(-2).to(dtype)


def quantize(weight: Tensor) -> Int4Weight:
    """Weights [..., out, in] by the rule, from their groups alone.

    Raises `CheckpointError` if the inputs are no whole groups, or a weight is not finite.
    """
    groups = _groups_of(weight)
    scale = _scale_of(groups)
    return Int4Weight(pack(_codes_of(groups, scale).flatten(-2)), scale)


def requantize(weight: Tensor) -> Int4Weight:
    """As `quantize`, but groups that are dequantised INT4 get their scale back, and so their bytes.

    Args:
        weight: [..., out, in]; in bfloat16 the weights of such a group are code · scale, rounded.
    """
    groups = _groups_of(weight)
    scale = _scale_of(groups)
    codes = _codes_of(groups, scale)
    other = _other_scale(scale, groups, weight.dtype)
    # That leaves few of the groups that were trained.
    maybe = (other != scale) & ~_gives_back(codes, scale, groups, weight.dtype)
    found = maybe.nonzero(as_tuple=True)
    found_codes = _codes_of(groups[found], other[found])
    fits = _gives_back(found_codes, other[found], groups[found], weight.dtype)
    places = tuple(index[fits] for index in found)
    scale[places], codes[places] = other[places], found_codes[fits]
    return Int4Weight(pack(codes.flatten(-2)), scale)


def fake_quantize(weight: Tensor) -> Tensor:
    """`dequantize(requantize(weight in bfloat16))` in the number format of `weight`, bit for bit.

    Nothing waits for the device: a group with a number that is not finite is not finite either.

    Args:
        weight: [..., out, in], inputs in whole groups, float32 or bfloat16.
    """
    result = torch.empty_like(weight, requires_grad=False, memory_format=torch.contiguous_format)
    return fake_quantize_into(result, weight)


@torch.no_grad()
def fake_quantize_into(result: Tensor, weight: Tensor) -> Tensor:
    """The same, into a contiguous tensor of the shape and number format of `weight`; returns it."""
    if weight.is_cuda:
        # Triton need not be installed where there is no CUDA device.
        from k25_train import int4_triton

        int4_triton.fake_quantize_into(result, weight.detach().contiguous())
        return result
    inputs = weight.shape[-1]
    rows = max(1, _PIECE_ELEMENTS // inputs)
    pieces = weight.reshape(-1, inputs).split(rows)
    for into, piece in zip(result.view(-1, inputs).split(rows), pieces, strict=True):
        into.copy_(_fake_quantize_rows(piece))
    return result


def _fake_quantize_rows(weight: Tensor) -> Tensor:
    """The twin of `int4_triton.fake_quantize_into`, [rows, in] in bfloat16 or float32 -> float32."""
    groups = weight.to(torch.bfloat16).float().unflatten(-1, (-1, GROUP_SIZE))
    scale = _scale_of(groups)
    other = _other_scale(scale, groups, torch.bfloat16)
    weights, others = _rounded(groups, scale), _rounded(groups, other)
    is_other = (others == groups).all(-1) & ~(weights == groups).all(-1)
    return torch.where(is_other.unsqueeze(-1), others, weights).flatten(-2)


def keep_released(ours: Int4Weight, weight: Tensor, released: Int4Weight) -> Int4Weight:
    """`ours`, with the released bytes in every group of `weight` that is still what they stand for.

    Args:
        ours: `weight` quantised.
        weight: [..., out, in] bfloat16.
        released: of the same shape, whatever codes and scales it has.
    """
    same = (dequantize(released, weight.dtype) == weight).unflatten(-1, (-1, GROUP_SIZE)).all(-1)
    words = same.repeat_interleave(GROUP_SIZE // CODES_PER_WORD, dim=-1)
    return Int4Weight(
        torch.where(words, released.packed, ours.packed), torch.where(same, released.scale, ours.scale)
    )


def _groups_of(weight: Tensor) -> Tensor:
    """[..., out, in] -> float32 [..., out, in / 32, 32]."""
    if weight.shape[-1] % GROUP_SIZE:
        raise CheckpointError(
            f"a matrix {list(weight.shape)} has {weight.shape[-1]} inputs, but INT4 needs whole groups of "
            f"{GROUP_SIZE}; export it in bf16"
        )
    groups = weight.float().unflatten(-1, (-1, GROUP_SIZE))
    if not groups.isfinite().all():
        raise CheckpointError("a weight is not finite, which INT4 cannot hold; export a sound checkpoint")
    return groups


def _scale_of(groups: Tensor) -> Tensor:
    return (groups.abs().amax(-1) / MAX_CODE).to(torch.bfloat16)


def _codes_of(groups: Tensor, scale: Tensor) -> Tensor:
    """Codes [..., 32] in int8 of groups [..., 32] and their scales [...]."""
    divisor = scale.float().unsqueeze(-1)
    codes = (groups / torch.where(divisor == 0, 1, divisor)).round_().clamp_(-MAX_CODE, MAX_CODE)
    return torch.where(divisor == 0, 0, codes).to(torch.int8)


def _rounded(groups: Tensor, scale: Tensor) -> Tensor:
    """code · scale, rounded to bfloat16, in float32; of groups [..., 32] and their scales [...]."""
    weights = _codes_of(groups, scale).float().mul_(scale.float().unsqueeze(-1))
    return weights.to(torch.bfloat16).float()


def _gives_back(codes: Tensor, scale: Tensor, groups: Tensor, dtype: torch.dtype) -> Tensor:
    """[...] bool: whether code · scale is, in `dtype`, every weight of a group."""
    weights = codes.float().mul_(scale.float().unsqueeze(-1)).to(dtype).float()
    return (weights == groups).all(-1)


def _other_scale(scale: Tensor, groups: Tensor, dtype: torch.dtype) -> Tensor:
    """The neighbour of each scale 7 of which are, in `dtype`, the largest weight; or the scale itself.

    The rule can miss the scale of a dequantised group by one step of bfloat16. Only one neighbour can be
    meant: 7 times these are 14 steps of the scale apart, and 7 scales are rounded to multiples of 4 or 8.
    """
    largest, found = groups.abs().amax(-1), scale
    for direction in (-1, 1):
        neighbour = _step(scale, direction)
        is_meant = (MAX_CODE * neighbour.float()).to(dtype).float() == largest
        found = torch.where(is_meant, neighbour, found)
    return found


def _step(scale: Tensor, direction: int) -> Tensor:
    """The next larger or smaller bfloat16 of a positive one."""
    bits = scale.float().view(torch.int32) + direction * _BF16_STEP
    return bits.clamp_(min=0).view(torch.float32).to(torch.bfloat16)
