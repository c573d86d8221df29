"""Attention to blocks of keys, put together, against attention to all of them; what is kept of it."""

import pytest
import torch
from torch import Tensor

from parallel.context.blocks import KeyBlock, Segment
from parallel.context.merge import MergedAttention, merged

QUERIES, HEADS, KEYS, WIDTH = 5, 2, 9, 4


def block(rows: slice) -> KeyBlock:
    """A block to which these queries attend."""
    number = rows.stop - rows.start
    nothing = torch.zeros(0, dtype=torch.int64)
    return KeyBlock((0,), False, (Segment(number, 1),), rows, nothing, torch.zeros(2, 2, dtype=torch.int32))


def attention(logits: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
    """Output [q, H, V] and logarithms [q, H] of logits [q, H, K] and values [K, H, V]."""
    return torch.einsum("qhk,khv->qhv", logits.softmax(2), values), logits.logsumexp(2)


@pytest.mark.parametrize("scale", [1.0, 60.0])
def test_two_blocks_are_as_one(scale: float) -> None:
    generator = torch.Generator().manual_seed(1)
    logits = scale * torch.randn(QUERIES, HEADS, KEYS, generator=generator)
    values = torch.randn(KEYS, HEADS, WIDTH, generator=generator)
    whole = attention(logits, values)
    parts = (attention(logits[:, :, part], values[part]) for part in (slice(0, 3), slice(3, None)))
    output, logsum = merged(*next(parts), *next(parts))
    torch.testing.assert_close(output, whole[0])
    torch.testing.assert_close(logsum, whole[1])


def test_each_block_has_queries_of_its_own() -> None:
    generator = torch.Generator().manual_seed(2)
    logits = torch.randn(QUERIES, HEADS, KEYS, generator=generator)
    values = torch.randn(KEYS, HEADS, WIDTH, generator=generator)
    # The first query attends to nothing, and the last ones to the second block alone.
    logits[0], logits[3:, :, :4] = -torch.inf, -torch.inf
    found = MergedAttention(QUERIES)
    found.add(*attention(logits[1:3, :, :4], values[:4]), block(slice(1, 3)))
    found.add(*attention(logits[1:, :, 4:], values[4:]), block(slice(1, 5)))
    output, logsum = found.result(torch.zeros(QUERIES, HEADS, WIDTH), WIDTH)
    whole = attention(logits[1:], values)
    torch.testing.assert_close(output[1:], whole[0])
    torch.testing.assert_close(logsum, logits.logsumexp(2))
    assert not output[0].any()


def test_what_a_kernel_has_filled_up_is_not_kept() -> None:
    wide = torch.ones(QUERIES, HEADS, WIDTH + 2, dtype=torch.bfloat16)
    found = MergedAttention(QUERIES)
    found.add(wide[..., :WIDTH], torch.zeros(QUERIES, HEADS), block(slice(0, QUERIES)))
    output, _ = found.result(wide, WIDTH)
    assert output.untyped_storage().nbytes() == QUERIES * HEADS * WIDTH * 2
