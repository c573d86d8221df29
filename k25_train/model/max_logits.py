"""The largest attention logit of each head, which QK-Clip needs and most fused kernels do not return.

Computed apart from attention, by products of queries and keys once more: on CUDA in one launch for all
documents (`max_logits_triton.py`), elsewhere document by document.

Shapes: T queries and K keys of all documents, of which there are as many unless ranks share documents; H
heads, L queries and M keys of a document, Q query/key head size, N queries of a block.
"""

import functools

import torch
from torch import Tensor

from k25_train.model.documents import DocumentBounds

LARGEST_LOGITS = "k25::largest_logits"
QUERY_BLOCK, KEY_BLOCK = 256, 4096
"""Queries and keys of a block whose maximum logits are taken at once: 128 MiB for 64 heads in bfloat16."""


@torch.library.custom_op(LARGEST_LOGITS, mutates_args=(), device_types="cuda")
def largest_logits(query: Tensor, key: Tensor, first_keys: Tensor, last_keys: Tensor, scale: float) -> Tensor:
    """The largest softmax input of each head over packed documents on CUDA, in float32.

    Args:
        query: [T, H, Q], of any floating point.
        key: [K, H, Q], of the same type.
        first_keys: [T] int32, the first key that each query attends to; behind the last one if to none. Both
            do not decrease, but for queries that attend to none (`DocumentBounds.first_keys`,
            `KeyBlock.first_and_last_keys`).
        last_keys: [T] int32, the last one.

    Returns [H] float32; infinite where a logit is NaN, minus infinity if all tokens are padding. It is an
    operator of torch's, so that tensors without memory can be sent through it.
    """
    from k25_train.model import max_logits_triton

    return max_logits_triton.launch(query, key, first_keys, last_keys, scale)


@largest_logits.register_fake
def _(query: Tensor, key: Tensor, first_keys: Tensor, last_keys: Tensor, scale: float) -> Tensor:
    return query.new_empty(query.shape[1], dtype=torch.float32)


@torch.no_grad()
def max_logits_of_documents(
    query: Tensor, key: Tensor, documents: DocumentBounds, scale: float
) -> Tensor | None:
    """The same document by document, on any device: [T, H, Q] twice -> [H] float32; NaN where a logit is.

    None if all is padding.
    """
    pieces = zip(query.split(documents.lengths), key.split(documents.lengths), strict=True)
    maxima = [
        max_logits_per_head(q_LHQ.transpose(0, 1), k_LHQ.transpose(0, 1), scale)
        for position, (q_LHQ, k_LHQ) in enumerate(pieces)
        if position not in documents.padding
    ]
    return torch.stack(maxima).amax(0) if maxima else None


@torch.no_grad()
def max_logits_per_head(query: Tensor, key: Tensor, scale: float, *, is_causal: bool = True) -> Tensor:
    """The largest softmax input of each head: query [H, L, Q] and key [H, M, Q] -> [H] float32.

    If it is causal, the last keys are the queries' own, M >= L; otherwise all queries attend to all keys.
    Computed in blocks of queries and keys, so that memory does not grow with the document. In bfloat16 the
    result is rounded to that type, by up to 0.4%.
    """
    length, num_keys = query.shape[1], key.shape[1]
    later_NN = _minus_infinity_for_later_keys(query.dtype, query.device)
    key_HQM = key.transpose(1, 2)
    maxima = []
    for start in range(0, length, QUERY_BLOCK):
        stop = min(start + QUERY_BLOCK, length)
        block_HNQ, size = query[:, start:stop], stop - start
        num_earlier = num_keys
        if is_causal:
            # The diagonal block is masked; blocks of earlier keys are not.
            num_earlier += start - length
            own_HQN = key_HQM[:, :, num_earlier : num_earlier + size]
            own = torch.baddbmm(later_NN[:size, :size], block_HNQ, own_HQN)
            maxima.append(own.amax((1, 2)))
        for first in range(0, num_earlier, KEY_BLOCK):
            last = min(first + KEY_BLOCK, num_earlier)
            maxima.append((block_HNQ @ key_HQM[:, :, first:last]).amax((1, 2)))
    # A positive scale commutes with the maximum.
    return torch.stack(maxima).amax(0).float() * scale


@functools.cache
def _minus_infinity_for_later_keys(dtype: torch.dtype, device: torch.device) -> Tensor:
    """[N, N], added to the logits of a block of N queries and the keys of the same tokens."""
    return torch.full((QUERY_BLOCK, QUERY_BLOCK), -torch.inf, dtype=dtype, device=device).triu(1)
