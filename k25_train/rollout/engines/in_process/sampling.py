"""Which token is drawn: a pure function of the distribution, the seed and the token's position.

    u = hash(seed, position in the response), uniform over (0, 1)
    token = the first one whose cumulated probability exceeds u, in float64

So the same response is drawn alone or among others, before or after an interruption. What is left is the
rounding of the logits, which depends on how many responses share a forward: another token is drawn if u lies
within that rounding of a border between two tokens. With log-probabilities that differ by ε the cumulated
probability differs by less than ε, so less than 2·ε of all draws do, about one in a million in float32.
"""

from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

_GOLDEN = np.uint64(0x9E3779B97F4A7C15)
_WORD = (1 << 64) - 1
_BITS = 52


class Drawn(NamedTuple):
    """One token for each of b responses."""

    ids: Tensor
    """[b] int64."""
    logprobs: Tensor
    """[b] float32, in nats; NaN where the distribution has no sense."""


def uniforms(seeds: list[int], positions: list[int]) -> np.ndarray:
    """[b] float64 in (0, 1): a number for each pair of a seed (any integer, modulo 2^64) and a position.

    The finaliser of SplitMix64 (Steele, Lea, Flood 2014), over the seed and then over the position.
    """
    mixed = _mix(np.array([seed & _WORD for seed in seeds], dtype=np.uint64) + _GOLDEN)
    mixed = _mix((mixed ^ _mix(np.array(positions, dtype=np.uint64))) + _GOLDEN)
    return ((mixed >> np.uint64(64 - _BITS)).astype(np.float64) + 0.5) / 2.0**_BITS


def draw(logits_BV: Tensor, temperatures: Tensor, forbidden: Tensor, uniforms: Tensor) -> Drawn:
    """Draw one token for each response.

    Args:
        logits_BV: [b, V] of the model, before any temperature.
        temperatures: [b] float32; 0 for the most probable token.
        forbidden: [b, V] or [1, V] bool: what is never drawn.
        uniforms: [b] float64 in (0, 1).

    Log-probabilities are those of the logits, whatever the temperature and what is forbidden.
    """
    logprobs = torch.log_softmax(logits_BV.float(), dim=-1)
    # What is drawn from: powers of the probabilities, of what is allowed; the sum needs not be 1.
    is_greedy = temperatures == 0
    scaled = logprobs / torch.where(is_greedy, 1.0, temperatures).unsqueeze(1)
    allowed = scaled.masked_fill_(forbidden, -torch.inf)
    largest = allowed.max(dim=-1, keepdim=True)
    cumulated = (allowed - largest.values).double().exp_().cumsum_(dim=-1)
    # Rounding must not lead to the sum itself, behind which nothing is allowed.
    total = cumulated[:, -1:]
    places = (uniforms.unsqueeze(1) * total).minimum(total.nextafter(torch.zeros_like(total)))
    sampled = torch.searchsorted(cumulated, places, right=True).squeeze(1)
    # Without sense, a distribution is all NaN, and what is drawn is out of range.
    ids = torch.where(is_greedy, largest.indices.squeeze(1), sampled.clamp_(max=logprobs.shape[1] - 1))
    return Drawn(ids, logprobs.gather(1, ids.unsqueeze(1)).squeeze(1))


def _mix(words: np.ndarray) -> np.ndarray:
    words = (words ^ (words >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    words = (words ^ (words >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return words ^ (words >> np.uint64(31))
