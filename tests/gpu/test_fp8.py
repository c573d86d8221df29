"""FP8 storage on a GPU: the twin's bits, and no waiting for the device."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from parallel.activations.fp8 import compress, decompress
from tests.helpers.fp8_reference import KINDS, hostile

pytestmark = pytest.mark.gpu


def bits(tensor: Tensor) -> Tensor:
    return tensor.cpu().view({1: torch.uint8, 2: torch.int16, 4: torch.int32}[tensor.element_size()])


def check_same_bits(on_cpu: Tensor, on_gpu: Tensor) -> None:
    """Both ways, of one tensor in both places."""
    expected, found = compress(on_cpu), compress(on_gpu)
    assert torch.equal(bits(found.values), bits(expected.values))
    assert torch.equal(bits(found.scales), bits(expected.scales))
    back = decompress(found)
    assert back.is_cuda and back.shape == on_gpu.shape
    assert torch.equal(bits(back), bits(decompress(expected)))


@given(
    kind=st.sampled_from(KINDS),
    seed=st.integers(0, 2**32 - 1),
    shape=st.tuples(
        st.integers(0, 3), st.integers(0, 40), st.sampled_from([0, 1, 127, 128, 129, 512, 700, 2048])
    ),
    dtype=st.sampled_from([torch.float32, torch.bfloat16]),
)
def test_same_bits_as_the_twin(kind: str, seed: int, shape: tuple[int, ...], dtype: torch.dtype) -> None:
    tensor = hostile(kind, seed, shape, dtype)
    check_same_bits(tensor, tensor.cuda())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("kind", KINDS)
def test_same_bits_of_a_million_numbers(kind: str, dtype: torch.dtype) -> None:
    tensor = hostile(kind, 0, (512, 7168), dtype)
    check_same_bits(tensor, tensor.cuda())


def test_every_bfloat16() -> None:
    every = torch.arange(-(2**15), 2**15, dtype=torch.int32).to(torch.int16).view(torch.bfloat16)
    check_same_bits(every.view(-1, 512), every.view(-1, 512).cuda())
    shuffled = every[torch.randperm(2**16, generator=torch.Generator().manual_seed(0))].view(-1, 512)
    check_same_bits(shuffled, shuffled.cuda())


def test_rows_that_are_apart() -> None:
    wide = torch.randn(9, 600, generator=torch.Generator().manual_seed(0)).bfloat16()
    on_gpu = wide.cuda()
    check_same_bits(wide[:, 300:], on_gpu[:, 300:])
    check_same_bits(wide[::2, 1:130], on_gpu[::2, 1:130])
    check_same_bits(wide.T, on_gpu.T)
    check_same_bits(wide[:1].expand(9, 600), on_gpu[:1].expand(9, 600))


def test_more_elements_than_32_bits_count() -> None:
    rows = torch.zeros(2**18 + 9, 8192, dtype=torch.bfloat16, device="cuda")
    rows[-9:] = torch.randn(9, 8192, generator=torch.Generator().manual_seed(0)).bfloat16()
    last = rows[-9:].cpu()
    stored, expected = compress(rows), compress(last)
    assert torch.equal(bits(stored.values[-9:]), bits(expected.values))
    assert torch.equal(bits(stored.scales[-9:]), bits(expected.scales))
    back = decompress(stored)
    assert torch.equal(bits(back[-9:]), bits(decompress(expected)))
    assert not back[:-9].any()


def test_it_never_waits_for_the_device() -> None:
    tensor = torch.randn(64, 7168, device="cuda", dtype=torch.bfloat16)
    decompress(compress(tensor))
    torch.cuda.set_sync_debug_mode("error")
    try:
        decompress(compress(tensor))
    finally:
        torch.cuda.set_sync_debug_mode("default")
