"""The largest logits on a GPU: right, and found without waiting for the device."""

import pytest
import torch
from torch import Tensor

from tests.helpers.gpu import in_fresh_process
from tests.helpers.qk_clip_reference import largest_logits

pytestmark = pytest.mark.gpu


def clip_on_gpu(lengths: tuple[int, ...]) -> list[tuple[Tensor, Tensor]]:
    """(found, expected): largest logits, and a shard of a query projection that they scale."""
    from parallel.megatron.platform import use_platform

    device = use_platform("cuda")
    from k25_train.model.documents import DocumentBounds
    from k25_train.model.max_logits import largest_logits as found_logits
    from k25_train.optim.qk_clip import clip_factors, query_row_scales, scale_rows

    generator = torch.Generator().manual_seed(3)
    query, key = (torch.randn(sum(lengths), 4, 24, generator=generator).bfloat16() for _ in range(2))
    on_device = [tensor.to(device) for tensor in (query, key)]
    documents = DocumentBounds.of(lengths, device)
    keys = documents.first_keys, documents.last_keys
    weight = torch.randn(4 * 24, 10, generator=generator)
    shard = weight.flatten()[35:901].clone().to(device)
    # The kernel is compiled at first use.
    found_logits(*on_device, *keys, 0.3)
    torch.cuda.set_sync_debug_mode("error")
    largest = found_logits(*on_device, *keys, 0.3)
    scales = query_row_scales(clip_factors(largest, 5.0), nope=16, rope=8)
    scale_rows(shard, 35, scales, num_columns=10)
    torch.cuda.set_sync_debug_mode("default")
    scaled = (weight * scales.cpu()[:, None]).flatten()[35:901]
    return [(largest.cpu(), largest_logits(query, key, lengths, 0.3).float()), (shard.cpu(), scaled)]


def test_the_clip_never_waits_for_the_device() -> None:
    logits, weights = in_fresh_process(clip_on_gpu, (3, 700, 256, 41))
    # bfloat16 rounds a product by up to 0.4%.
    torch.testing.assert_close(*logits, rtol=4e-3, atol=0)
    torch.testing.assert_close(*weights, rtol=1e-6, atol=0)
