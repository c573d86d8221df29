"""Experts as INT4 has them: the numbers of an export's bytes, in torch and Triton, and when they are made."""

from __future__ import annotations

import math
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from k25_train import int4
from k25_train.config.model import Quantization
from k25_train.int4 import GROUP_SIZE, dequantize, fake_quantize, pack, quantize, requantize
from k25_train.model.quantization import AsInt4, AsKept, computed_weights
from parallel.activations.storage import storage_id, weights_of
from parallel.megatron.held_weights import held_weights
from tests.helpers.int4_reference import bf16, random_weights
from tests.helpers.triton_processes import bits, process

BOTH = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])


def by_the_rule(weight: np.ndarray) -> np.ndarray:
    """Group by group and weight by weight, in float32, of weights that come from no INT4."""
    rounded = bf16(weight).reshape(-1, 32)
    result = np.zeros_like(rounded)
    for group, values in enumerate(rounded):
        scale = bf16(np.abs(values).max(keepdims=True) / np.float32(7))[0]
        for index, value in enumerate(values):
            code = 0 if scale == 0 else max(-7, min(7, round(float(value) / float(scale))))
            result[group, index] = bf16(np.array([code], np.float32) * scale)[0]
    return result.reshape(weight.shape)


def dequantised(seed: int = 0) -> Tensor:
    """Weights that INT4 stands for, [300, 64] bfloat16, with scales that the rule misses."""
    return dequantize(quantize(torch.randn(300, 64, generator=torch.Generator().manual_seed(seed))))


@BOTH
def test_the_numbers_are_those_of_the_rule(dtype: torch.dtype) -> None:
    weight = random_weights(24, 96, dtype=dtype)[2:]
    found = fake_quantize(weight)
    assert found.dtype is dtype
    expected = by_the_rule(weight.float().numpy())
    assert np.array_equal(found.float().numpy(), expected)


@BOTH
def test_the_numbers_are_those_of_an_export(dtype: torch.dtype) -> None:
    for weight in (random_weights(24, 96), random_weights(3, 8, 128), dequantised()):
        stored = requantize(weight.to(dtype).to(torch.bfloat16))
        assert torch.equal(bits(fake_quantize(weight.to(dtype))), bits(dequantize(stored).to(dtype)))


def test_the_numbers_are_those_of_compressed_tensors() -> None:
    from compressed_tensors.quantization import QuantizationArgs
    from compressed_tensors.quantization.lifecycle.forward import fake_quantize as theirs

    weight = random_weights(16, 256)[2:]
    scheme = QuantizationArgs(num_bits=4, type="int", symmetric=True, strategy="group", group_size=32)
    scale = quantize(weight).scale.float()
    expected = theirs(weight.float(), scale, torch.zeros_like(scale, dtype=torch.int8), scheme)
    assert torch.equal(fake_quantize(weight), expected.to(torch.bfloat16))


@BOTH
def test_what_is_rounded_already_stays(dtype: torch.dtype) -> None:
    """Of every scale, also of those that the rule misses by a step: training from released weights begins
    with the released model, whose bytes an export of it has."""
    significands = torch.arange(128, 256).float() * 2.0**-15
    codes = torch.randint(-7, 8, (128, GROUP_SIZE), generator=torch.Generator().manual_seed(1)).to(torch.int8)
    codes[:, 5] = 7
    released = dequantize(int4.Int4Weight(pack(codes), significands.to(torch.bfloat16)[:, None]))
    assert not torch.equal(quantize(released).scale, significands.to(torch.bfloat16)[:, None])
    for weight in (released.to(dtype), dequantised().to(dtype)):
        assert torch.equal(fake_quantize(weight), weight)


def test_small_codes_and_scales() -> None:
    """Codes end at 7 on both sides, whatever few digits make of a scale; no scale is too small to count, and
    a group of zeros is zeros."""
    weight = torch.zeros(3, 32)
    weight[0, :4] = 2.0**-133 * torch.tensor([10, -10, 3, -8])
    weight[1, :2] = torch.tensor([1e-30, -4e-31])
    found = fake_quantize(weight)
    assert found[0, :4].div(2.0**-133).tolist() == [7, -7, 3, -7]
    assert found[1, 0] == pytest.approx(1e-30, rel=0.01)
    assert found[1, 1] == pytest.approx(-3 / 7 * 1e-30, rel=0.01)
    assert not found[2].any() and not found.isnan().any()
    asymmetric = torch.linspace(-8, 7, 32)[None]
    assert fake_quantize(asymmetric).div(8 / 7).abs().max() == pytest.approx(7, rel=0.01)


@pytest.mark.parametrize("wrong", [math.inf, -math.inf, math.nan])
def test_what_is_not_finite_stays_so(wrong: float) -> None:
    """And so shows in the loss and the gradient."""
    weight = torch.ones(2, 64)
    weight[1, 40] = wrong
    found = fake_quantize(weight)
    assert found[0].isfinite().all() and found[1, :32].isfinite().all()
    assert not found[1, 40].isfinite()


def test_pieces_change_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    weight = random_weights(3, 8, 128)
    expected = fake_quantize(weight)
    monkeypatch.setattr(int4, "_PIECE_ELEMENTS", 300)
    assert torch.equal(fake_quantize(weight), expected)
    assert torch.equal(fake_quantize(weight.transpose(0, 1)), expected.transpose(0, 1))


# ---------------------------------------------------------------------------------------------------------
# When they are made.


class Layer(nn.Module):
    """A module that computes with its weights as INT4 has them."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(2, 3, 32, generator=torch.Generator().manual_seed(3)))
        self.computed = computed_weights(Quantization.int4_qat, weight=self.weight)

    def forward(self) -> Tensor:
        return self.computed.of("weight", self.weight)

    def update(self, factor: float) -> Tensor:
        """Change the weights as data parallelism does, behind autograd's back; what INT4 makes of them."""
        self.weight.data.mul_(factor)
        return fake_quantize(self.weight.detach())


def test_copies_are_made_once_while_weights_are_held(monkeypatch: pytest.MonkeyPatch) -> None:
    made = []
    monkeypatch.setattr(
        "k25_train.model.quantization.fake_quantize_into",
        lambda copy, weights: made.append(1) or int4.fake_quantize_into(copy, weights),
    )
    layer = Layer()
    for factor in (1.0, 1.1, 0.7):
        expected = layer.update(factor)
        made.clear()
        with held_weights([layer]):
            first = layer()
            assert all(layer() is first for _ in range(3)) and len(made) == 1
            assert torch.equal(first, expected)


def test_where_nobody_holds_weights_each_call_sees_what_they_are() -> None:
    layer = Layer()
    with held_weights([layer]):
        held = layer()
    kept = held.clone()
    for factor in (1.0, 1.3):
        expected = layer.update(factor)
        assert torch.equal(layer(), expected)
    assert torch.equal(held, kept), "the copy is left to whoever goes backward"
    with pytest.raises(ZeroDivisionError), held_weights([layer]):
        layer()
        raise ZeroDivisionError
    expected = layer.update(2.0)
    assert torch.equal(layer(), expected), "a step that failed holds nothing"


def test_a_copy_that_changed_before_the_backward_pass_is_noticed() -> None:
    layer = Layer()
    rows = torch.randn(4, 32, requires_grad=True)
    with held_weights([layer]):
        output = rows @ layer()[0].T
    layer.update(2.0)
    with held_weights([layer]):
        layer()
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        output.sum().backward()


def test_copies_are_weights_of_no_checkpoint() -> None:
    layer = Layer()
    assert list(layer.state_dict()) == ["weight"]
    [copy] = layer.buffers()
    assert storage_id(copy) in weights_of([layer]), "no activation policy is for them"
    assert copy.shape == layer.weight.shape and not copy.requires_grad


def test_without_quantisation_there_is_nothing() -> None:
    weight = nn.Parameter(torch.ones(1, 1, 32))
    computed = computed_weights(Quantization.none, weight=weight)
    assert isinstance(computed, AsKept) and computed.of("weight", weight) is weight
    assert not list(computed.buffers())
    assert isinstance(computed_weights(Quantization.int4_qat, weight=weight), AsInt4)


# ---------------------------------------------------------------------------------------------------------
# The kernel, by Triton's interpreter and its compiler.


@pytest.fixture(scope="module")
def interpreter() -> Iterator[ProcessPoolExecutor]:
    with process({"TRITON_INTERPRET": "1"}) as pool:
        yield pool


def interpret() -> None:
    """The twin's bits, of all kinds of groups."""
    from k25_train import int4_triton

    negative_zeros = random_weights(40, 96, seed=4)
    negative_zeros[5, 3:9] = -0.0
    for weight in (random_weights(70, 96), dequantised(), negative_zeros, torch.zeros(0, 32)):
        for dtype in (torch.float32, torch.bfloat16):
            given = weight.to(dtype)
            result = torch.empty_like(given)
            int4_triton.fake_quantize_into(result, given)
            assert torch.equal(bits(result), bits(fake_quantize(given)))
    for wrong in (math.inf, math.nan):
        given = torch.ones(1, 64)
        given[0, 3] = wrong
        int4_triton.fake_quantize_into(result := torch.empty_like(given), given)
        assert not result[0, 3].isfinite() and result[0, 32:].isfinite().all()


def test_the_kernel_has_the_twins_bits(interpreter: ProcessPoolExecutor) -> None:
    interpreter.submit(interpret).result()


def compile_for_h800() -> str:
    """PTX of the kernel for bfloat16 on sm_90."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    from k25_train import int4_triton

    kernel = int4_triton._fake_quantize_kernel
    types = {"words": "*i16", "results": "*i16", "num_groups": "i32", "is_bfloat16": "constexpr"}
    attributes = {(index,): [["tt.divisibility", 16]] for index in (0, 1)}
    source = ASTSource(kernel, types, {"is_bfloat16": True}, attributes)
    ptx: str = triton.compile(source, GPUTarget("cuda", 90, 32), int4_triton.COMPILE_OPTIONS).asm["ptx"]
    return ptx


@pytest.mark.slow
def test_it_compiles_unfused_to_accesses_of_16_bytes(tmp_path: Path) -> None:
    with process({"TRITON_CACHE_DIR": str(tmp_path), "TRITON_INTERPRET": "0"}) as pool:
        ptx = pool.submit(compile_for_h800).result()
    assert "fma" not in ptx and "div.full" not in ptx and "ftz" not in ptx
    assert ptx.count("ld.global.v4.b32") == ptx.count("ld.global") == 2
