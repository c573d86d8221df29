"""QK-Clip as the K2 report (arXiv 2507.20534, section 2.1) has it: whole matrices, one head after another."""

import math
from collections.abc import Sequence

import torch
from torch import Tensor


def largest_logits(query: Tensor, key: Tensor, lengths: Sequence[int], scale: float) -> Tensor:
    """Largest softmax input of each head, [H] float64: query and key [T, H, Q] of documents of `lengths`."""
    found = []
    for q, k in zip(query.double().split(lengths), key.double().split(lengths), strict=True):
        logits = torch.einsum("ihq,jhq->hij", q, k) * scale
        later = torch.ones(logits.shape[1:], dtype=torch.bool).triu(1)
        found.append(logits.masked_fill(later, -torch.inf).amax((1, 2)))
    return torch.stack(found).amax(0)


def clip_layer(
    q_up: Tensor,
    kv_up: Tensor,
    logits: Sequence[float],
    threshold: float,
    *,
    nope: int,
    rope: int,
    value: int,
) -> tuple[Tensor, Tensor]:
    """Clipped copies of a layer's projections q_up [H * (nope + rope), …] and kv_up [H * (nope + value), …].

    `logits` has the largest one of each head.
    """
    q_up, kv_up = q_up.clone(), kv_up.clone()
    for head, largest in enumerate(logits):
        if largest <= threshold:
            continue
        gamma = threshold / largest
        query = q_up[head * (nope + rope) : (head + 1) * (nope + rope)]
        query[:nope] *= math.sqrt(gamma)
        query[nope:] *= gamma
        kv_up[head * (nope + value) : (head + 1) * (nope + value)][:nope] *= math.sqrt(gamma)
    return q_up, kv_up
