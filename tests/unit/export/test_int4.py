"""INT4 weights against the rule in plain numpy, compressed-tensors, and their own way there and back."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
import torch
from torch import Tensor

from k25_train.errors import CheckpointError
from k25_train.int4 import (
    GROUP_SIZE,
    Int4Weight,
    dequantize,
    keep_released,
    pack,
    quantize,
    requantize,
    unpack,
)
from tests.helpers.int4_reference import by_the_rule, random_weights


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_bytes_are_those_of_the_rule(dtype: torch.dtype) -> None:
    weight = random_weights(24, 96, dtype=dtype)
    packed, scales = by_the_rule(weight.float().numpy())
    ours = quantize(weight)
    assert np.array_equal(ours.packed.numpy(), packed)
    assert np.array_equal(ours.scale.float().numpy(), scales)
    assert ours.shape_tensor().tolist() == [24, 96]
    assert ours.shape_tensor().dtype == torch.int32
    assert unpack(ours.packed).abs().amax() == 7
    # Random weights come from no INT4, so that recovering it changes nothing.
    recovered = requantize(random_weights(24, 96, dtype=dtype)[2:])
    assert torch.equal(recovered.packed, ours.packed[2:])
    assert torch.equal(recovered.scale, ours.scale[2:])


def test_codes_stay_within_seven_where_scales_have_few_digits() -> None:
    """The smallest bfloat16 is 2^-133: a scale of 10/7 of it becomes 1, and the quotients become 10."""
    weight = torch.zeros(2, 32)
    weight[0, :4] = 2.0**-133 * torch.tensor([10, -10, 3, -8])
    ours = quantize(weight)
    packed, scales = by_the_rule(weight.numpy())
    assert np.array_equal(ours.packed.numpy(), packed)
    assert np.array_equal(ours.scale.float().numpy(), scales)
    assert unpack(ours.packed)[0, :4].tolist() == [7, -7, 3, -7]


def test_packing_and_dequantising_equal_compressed_tensors() -> None:
    """The library reads what we write and writes what we write: codes, words and weights, bit for bit."""
    from compressed_tensors.compressors.pack_quantized.helpers import pack_to_int32, unpack_from_int32
    from compressed_tensors.quantization import QuantizationArgs
    from compressed_tensors.quantization.lifecycle.forward import dequantize as library_dequantize
    from compressed_tensors.quantization.lifecycle.forward import quantize as library_quantize

    codes = torch.arange(-8, 8, dtype=torch.int8).repeat(16, 16)
    codes = codes[:, torch.randperm(256)]
    assert torch.equal(pack(codes), pack_to_int32(codes, 4))
    assert torch.equal(unpack(pack(codes)), unpack_from_int32(pack(codes), 4, codes.shape))
    assert torch.equal(unpack(pack(codes)), codes)

    weight = random_weights(16, 256)[2:]
    ours = quantize(weight)
    scheme = QuantizationArgs(num_bits=4, type="int", symmetric=True, strategy="group", group_size=32)
    scale, zero = ours.scale.float(), torch.zeros_like(ours.scale, dtype=torch.int8)
    theirs = library_quantize(weight.float(), scale, zero, scheme, dtype=torch.int8)
    assert torch.equal(pack_to_int32(theirs, 4), ours.packed)
    weights = library_dequantize(unpack(ours.packed), ours.scale, zero, scheme)
    assert weights.dtype == torch.bfloat16
    assert torch.equal(weights, dequantize(ours))


def test_every_scale_and_code_comes_back() -> None:
    """All 128 significands of a bfloat16 with every second code that can be next to the largest one."""
    significands = torch.arange(128, 256).float()
    for exponent, code, sign in itertools.product((-130, -20, 3), range(8), (-1, 1)):
        codes = torch.zeros(128, GROUP_SIZE, dtype=torch.int8)
        codes[:, 3], codes[:, 17] = 7 * sign, code
        scale = (significands * 2.0**exponent).to(torch.bfloat16)[:, None]
        before = Int4Weight(pack(codes), scale)
        after = requantize(dequantize(before))
        assert torch.equal(dequantize(after), dequantize(before))
        assert torch.equal(after.packed, before.packed)
        # What nothing in the weights tells: zeros and sevens alone. 14 of 128 scales are then off.
        is_told = code not in (0, 7)
        assert is_told == torch.equal(after.scale, before.scale), (code, sign)
        assert (after.scale != before.scale).sum() <= 14
        kept = keep_released(after, dequantize(before), before)
        assert torch.equal(kept.scale, before.scale)
        # In float32 the largest weight is exactly 7 scales.
        assert torch.equal(quantize(dequantize(before, torch.float32)).scale, before.scale)


def test_the_rule_alone_misses_scales_that_were_made_in_float32() -> None:
    weight = torch.randn(256, 1024, generator=torch.Generator().manual_seed(2))
    for before, fewest, most in (
        (quantize(weight.to(torch.bfloat16)), 0.0, 0.0),
        (quantize(weight), 0.08, 0.13),
    ):
        again = dequantize(before)
        missed = (quantize(again).scale != before.scale).float().mean().item()
        assert fewest <= missed <= most
        after = requantize(again)
        assert torch.equal(after.packed, before.packed)
        assert torch.equal(after.scale, before.scale)


def test_only_groups_that_changed_get_other_bytes() -> None:
    before = quantize(random_weights(3, 8, 128))
    weight = dequantize(before)
    weight[1, 5, 70] += 0.3 * weight[1, 5, 64:96].abs().amax() + 1e-30
    after = requantize(weight)
    changed = torch.zeros(3, 8, 4, dtype=torch.bool)
    changed[1, 5, 2] = True
    words = changed.repeat_interleave(4, dim=-1)
    assert torch.equal(after.packed[~words], before.packed[~words])
    assert not torch.equal(after.packed[words], before.packed[words])


def test_released_bytes_of_another_rule_are_kept_where_weights_are_unchanged() -> None:
    """Codes of -8 and scales that are not amax / 7, as other quantisers write them."""
    codes = torch.randint(-8, 0, (8, 64), dtype=torch.int8)
    released = Int4Weight(pack(codes), (torch.rand(8, 2) + 0.5).to(torch.bfloat16))
    weight = dequantize(released)
    weight[4, 40] *= 2
    kept = keep_released(requantize(weight), weight, released)
    assert torch.equal(kept.packed[:4], released.packed[:4])
    assert torch.equal(kept.packed[4, :4], released.packed[4, :4])
    assert torch.equal(kept.packed[4, 4:], requantize(weight).packed[4, 4:])


@pytest.mark.parametrize(
    ("weight", "message"),
    [
        (torch.ones(2, 40), r"\[2, 40\] has 40 inputs, but INT4 needs whole groups of 32; export it in bf16"),
        (torch.full((2, 32), float("inf")), "not finite"),
        (torch.full((2, 32), float("nan")), "not finite"),
    ],
)
def test_what_int4_cannot_hold_is_refused(weight: Tensor, message: str) -> None:
    for make in (quantize, requantize):
        with pytest.raises(CheckpointError, match=message):
            make(weight)
