"""INT4 as experts compute with it: the kernel on a GPU gives the bits of its twin."""

import pytest
import torch

from k25_train.int4 import dequantize, fake_quantize, quantize
from tests.helpers.int4_reference import random_weights
from tests.helpers.triton_processes import bits

pytestmark = pytest.mark.gpu


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_same_bits_as_the_twin(dtype: torch.dtype) -> None:
    """Random groups, dequantised ones, and the stacked experts of a layer in pieces of another size."""
    dequantised = dequantize(quantize(random_weights(300, 64, dtype=torch.float32)))
    for weight in (random_weights(70, 96), dequantised, random_weights(24, 512, 2048)):
        given = weight.to(dtype)
        found = fake_quantize(given.cuda())
        assert torch.equal(bits(found.cpu()), bits(fake_quantize(given)))
        assert torch.equal(fake_quantize(found), found)
