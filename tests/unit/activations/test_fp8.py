"""FP8 storage on the CPU: the format by enumeration, its bounds, and inputs that break what is careless."""

import math
import runpy
import sys

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor
from torch.nn import functional

from parallel.activations.fp8 import Fp8Tensor, compress, decompress
from parallel.activations.sizes import fp8_bytes
from tests.helpers import fp8_reference
from tests.helpers.fp8_reference import KINDS, hostile
from tests.helpers.project_sources import REPO

DTYPES = (torch.float32, torch.bfloat16)
SMALLEST_SCALE = 2.0**-116

HOSTILE = st.builds(
    hostile,
    kind=st.sampled_from(KINDS),
    seed=st.integers(0, 2**32 - 1),
    shape=st.tuples(st.integers(0, 3), st.sampled_from([1, 127, 128, 129, 300])),
    dtype=st.sampled_from(DTYPES),
)


def bits(tensor: Tensor) -> Tensor:
    """A tensor's memory as integers."""
    return tensor.view({1: torch.uint8, 2: torch.int16, 4: torch.int32}[tensor.element_size()])


def there_and_back(tensor: Tensor) -> Tensor:
    return decompress(compress(tensor))


@given(tensor=HOSTILE)
def test_it_is_what_enumeration_finds(tensor: Tensor) -> None:
    stored = compress(tensor)
    codes, scales = fp8_reference.compressed(tensor)
    np.testing.assert_array_equal(bits(stored.values).numpy(), codes)
    np.testing.assert_array_equal(stored.scales.numpy(), scales)
    expected = fp8_reference.decompressed(codes, scales, tensor.dtype)
    np.testing.assert_array_equal(decompress(stored).float().numpy(), expected)


@given(tensor=HOSTILE)
def test_the_error_has_its_bound(tensor: Tensor) -> None:
    stored = compress(tensor)
    exact, scales, back = tensor.double(), stored.scales.double(), decompress(stored).double()
    scale = scales.repeat_interleave(128, 1)[:, : tensor.shape[1]]
    unit = 2.0**-21 if tensor.dtype == torch.float32 else 2.0**-8
    bound = torch.maximum(exact.abs(), 2.0**-6 * scale) / 16 + unit * back.abs()
    finite = tensor.isfinite()
    assert ((back - exact).abs() <= bound)[finite].all()
    assert back[finite].isfinite().all() and back[~finite].isnan().all()
    magnitudes = torch.where(finite, exact.abs(), 0)
    for start in range(0, tensor.shape[1], 128):
        tiles, of_tile = slice(start, start + 128), scales[:, start // 128]
        amax, where = magnitudes[:, tiles].max(1)
        small = of_tile == SMALLEST_SCALE
        assert (small | (of_tile * 2.0**-10 < amax / 400000)).all()
        found = back[:, tiles].gather(1, where[:, None])[:, 0].abs()
        ulp = 2.0**-23 * amax if tensor.dtype == torch.float32 else 0
        assert (small | ((found - amax).abs() <= ulp)).all()


@given(tensor=HOSTILE)
def test_a_second_time_changes_nothing(tensor: Tensor) -> None:
    once = compress(tensor)
    twice = compress(decompress(once))
    assert torch.equal(bits(twice.values), bits(once.values))
    ulps = (bits(twice.scales) - bits(once.scales)).abs()
    assert (ulps <= (1 if tensor.dtype == torch.float32 else 0)).all()


@given(tensor=HOSTILE)
def test_flushing_of_subnormals_changes_nothing(tensor: Tensor) -> None:
    stored, back = compress(tensor), there_and_back(tensor)
    assert torch.set_flush_denormal(True)
    try:
        flushed = compress(tensor)
        again = decompress(flushed)
    finally:
        torch.set_flush_denormal(False)
    assert torch.equal(bits(flushed.values), bits(stored.values))
    assert torch.equal(bits(flushed.scales), bits(stored.scales))
    assert torch.equal(bits(again), bits(back))


@pytest.mark.parametrize("dtype", DTYPES)
def test_every_code_is_read(dtype: torch.dtype) -> None:
    codes = torch.arange(256, dtype=torch.uint8).view(1, 256)
    stored = Fp8Tensor(codes.view(torch.float8_e4m3fn), torch.tensor([[1.0, 0.3]]), codes.shape, dtype)
    expected = fp8_reference.decompressed(codes.numpy(), np.array([[1, 0.3]], np.float32), dtype)
    found = decompress(stored)
    np.testing.assert_array_equal(found.float().numpy(), expected)
    assert found[0, 128].item() == 0 and found[0, 128].signbit()


@pytest.mark.parametrize("dtype", DTYPES)
def test_zeros_keep_their_sign(dtype: torch.dtype) -> None:
    zeros = torch.tensor([[0.0, -0.0] * 65], dtype=dtype)
    assert torch.equal(bits(there_and_back(zeros)), bits(zeros))
    assert (compress(zeros).scales == SMALLEST_SCALE).all()
    mixed = torch.tensor([[448.0, -1e-5, 1e-5, -0.0]], dtype=dtype)
    expected = torch.tensor([[448.0, -0.0, 0.0, -0.0]], dtype=dtype)
    assert torch.equal(bits(there_and_back(mixed)), bits(expected))


@pytest.mark.parametrize("dtype", DTYPES)
def test_subnormals_and_the_smallest_numbers_become_zero_or_normal(dtype: torch.dtype) -> None:
    smallest = torch.finfo(dtype).smallest_normal
    numbers = torch.tensor(
        [[torch.finfo(dtype).tiny / 64, -smallest / 2, smallest, 2 * smallest, 3 * smallest]]
    )
    expected = torch.tensor([[0.0, -0.0, 0.0, 2 * smallest, 4 * smallest]])
    assert torch.equal(bits(there_and_back(numbers.to(dtype))), bits(expected.to(dtype)))


@pytest.mark.parametrize("dtype", DTYPES)
def test_the_largest_numbers_stay_finite(dtype: torch.dtype) -> None:
    largest = torch.finfo(dtype).max
    numbers = torch.tensor([[largest, -largest, 1.0]], dtype=dtype)
    assert there_and_back(numbers).tolist() == [[largest, -largest, 0.0]]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("fault", [math.inf, -math.inf, math.nan])
def test_what_is_not_finite_becomes_nan_and_spreads_nowhere(fault: float, dtype: torch.dtype) -> None:
    numbers = torch.linspace(-3, 3, 2 * 200, dtype=dtype).view(2, 200)
    faulty = numbers.clone()
    faulty[0, 5] = faulty[1, 150] = fault
    found, expected = there_and_back(faulty), there_and_back(numbers)
    expected[0, 5] = expected[1, 150] = math.nan
    assert torch.equal(bits(found), bits(expected))
    alone = there_and_back(torch.full((1, 130), fault, dtype=dtype))
    assert alone.isnan().all()


def test_one_huge_element_costs_its_tile_only() -> None:
    numbers = torch.full((2, 256), 1e-4)
    numbers[0, 3] = 1e4
    back = there_and_back(numbers)
    assert (back[0, :128] == 0).sum() == 127
    torch.testing.assert_close(back[1], numbers[1], rtol=1 / 16, atol=0)
    torch.testing.assert_close(back[0, 128:], numbers[0, 128:], rtol=1 / 16, atol=0)


@pytest.mark.parametrize("number", [1.0, -448.0, 1.0078125, 6e-33, -3e38])
def test_tiles_of_one_number_come_back(number: float) -> None:
    for dtype, ulps in ((torch.float32, 1), (torch.bfloat16, 0)):
        numbers = torch.full((1, 129), number, dtype=dtype)
        assert (bits(there_and_back(numbers)) - bits(numbers)).abs().max() <= ulps


def test_powers_of_two_as_scales_would_lose_more() -> None:
    """Why scales are not rounded up to powers of two, which would make every quotient exact."""
    generator = torch.Generator().manual_seed(1)
    normal, gate = torch.randn(2, 1000, 128, generator=generator)
    outlier = torch.cat([30 * normal[:, :1], normal[:, 1:]], 1)
    for tiles, ratio in ((normal, 1.02), (functional.silu(gate) * normal, 1.1), (outlier, 2.5)):
        scales = (tiles.abs().amax(1, keepdim=True) / 448).log2().ceil().exp2()
        rounded = (tiles / scales).to(torch.float8_e4m3fn).float() * scales
        ours, theirs = ((back - tiles).square().mean().sqrt() for back in (there_and_back(tiles), rounded))
        assert theirs > ratio * ours


@pytest.mark.parametrize(
    "shape", [(0,), (1,), (128,), (2, 3, 129), (0, 128), (3, 0), (2, 0, 5), (2, 1, 1, 1)]
)
@pytest.mark.parametrize("dtype", DTYPES)
def test_any_shape(shape: tuple[int, ...], dtype: torch.dtype) -> None:
    tensor = torch.full(shape, 3.0, dtype=dtype)
    stored = compress(tensor)
    rows = math.prod(shape[:-1])
    assert stored.values.shape == (rows, shape[-1]) and stored.scales.shape == (rows, -(-shape[-1] // 128))
    assert stored.values.is_contiguous() and stored.scales.is_contiguous()
    assert stored.values.nbytes + stored.scales.nbytes == fp8_bytes(shape)
    back = decompress(stored)
    assert back.dtype == dtype and back.is_contiguous() and torch.equal(back, tensor)


def test_any_strides() -> None:
    numbers = torch.randn(6, 4, 260, generator=torch.Generator().manual_seed(0))
    views = [numbers.mT, numbers[::2, :, 1:200:3], numbers[..., 130:], numbers[:1, :1].expand(5, 3, 260)]
    for view in views:
        assert torch.equal(there_and_back(view), there_and_back(view.contiguous()))


def test_the_input_and_autograd_are_left_alone() -> None:
    tensor = torch.randn(3, 130, requires_grad=True)
    before = tensor.detach().clone()
    stored = compress(tensor)
    assert not stored.values.requires_grad and not stored.scales.requires_grad
    assert not decompress(stored).requires_grad
    assert torch.equal(tensor, before)
    stored.values.zero_()
    assert torch.equal(tensor, before)


def test_an_activation_takes_little_more_than_half() -> None:
    assert fp8_bytes((4096, 7168)) / (2 * 4096 * 7168) == 0.5 * (1 + 4 / 128)


@pytest.mark.parametrize("dtype", [torch.float16, torch.float64, torch.int32, torch.float8_e4m3fn])
def test_other_dtypes_are_refused(dtype: torch.dtype) -> None:
    with pytest.raises(TypeError, match=f"{dtype}.* supports float32 and bfloat16"):
        compress(torch.zeros(2, 3).to(dtype))


def test_scalars_and_other_devices_are_refused() -> None:
    with pytest.raises(ValueError, match="needs a last dimension"):
        compress(torch.tensor(1.0))
    with pytest.raises(ValueError, match="this one is on meta"):
        compress(torch.zeros(2, 3, device="meta"))
    values = torch.zeros(2, 3, device="meta").to(torch.float8_e4m3fn)
    with pytest.raises(ValueError, match="this one is on meta"):
        decompress(Fp8Tensor(values, torch.zeros(2, 1), values.shape, torch.float32))


def test_the_cpu_needs_no_triton(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "triton", None)
    monkeypatch.delitem(sys.modules, "parallel.activations.fp8_triton", raising=False)
    fresh = runpy.run_path(str(REPO / "parallel/activations/fp8.py"), run_name="fresh_fp8")
    assert torch.equal(fresh["decompress"](fresh["compress"](torch.ones(2, 3))), torch.ones(2, 3))
    assert "parallel.activations.fp8_triton" not in sys.modules
