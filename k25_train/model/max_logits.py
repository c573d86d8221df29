"""The largest attention logit of each head, which QK-Clip needs and the fused kernel does not return.

Shapes: H heads, L tokens of a document, Q query/key head size, N queries of a block.
"""

import functools

import torch
from torch import Tensor

QUERY_BLOCK, KEY_BLOCK = 256, 4096
"""Queries and keys of a block whose maximum logits are taken at once: 128 MiB for 64 heads in bfloat16."""


@torch.no_grad()
def max_logits_per_head(query: Tensor, key: Tensor, scale: float) -> Tensor:
    """The largest causal softmax input of each head: query and key [H, L, Q] -> [H] float32.

    Computed in blocks of queries and keys, so that memory does not grow with the document. In bfloat16 the
    result is rounded to that type, by up to 0.4%.
    """
    length = query.shape[1]
    later_NN = _minus_infinity_for_later_keys(query.dtype, query.device)
    key_HQL = key.transpose(1, 2)
    maxima = []
    for start in range(0, length, QUERY_BLOCK):
        stop = min(start + QUERY_BLOCK, length)
        block_HNQ, size = query[:, start:stop], stop - start
        # The diagonal block is masked; blocks of earlier keys are not.
        own = torch.baddbmm(later_NN[:size, :size], block_HNQ, key_HQL[:, :, start:stop])
        maxima.append(own.amax((1, 2)))
        for first in range(0, start, KEY_BLOCK):
            last = min(first + KEY_BLOCK, start)
            maxima.append((block_HNQ @ key_HQL[:, :, first:last]).amax((1, 2)))
    # A positive scale commutes with the maximum.
    return torch.stack(maxima).amax(0).float() * scale


@functools.cache
def _minus_infinity_for_later_keys(dtype: torch.dtype, device: torch.device) -> Tensor:
    """[N, N], added to the logits of a block of N queries and the keys of the same tokens."""
    return torch.full((QUERY_BLOCK, QUERY_BLOCK), -torch.inf, dtype=dtype, device=device).triu(1)
