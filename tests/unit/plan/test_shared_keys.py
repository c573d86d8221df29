"""What attention to other ranks' latents holds at a time, counted by hand for the longest stage."""

from dataclasses import replace

import pytest

from k25_train.compose.resolve import compose
from k25_train.plan.memory.shared_keys import shared_key_bytes
from k25_train.plan.pass_sizes import balanced_sizes
from parallel.config import ContextExchange

OWN, ALL = 4096, 262_144
"""Tokens of a rank and of a sequence, of which 64 ranks have as many each."""
HEADS, LATENT, BF16, FLOAT32 = 64, 576, 2, 4
PER_HEAD = 192 + 128 + 192 + (192 + 192) + (128 + 128)
"""Of a key in each head: it, its value, the value as wide as the key, gradients of both, and these side by
side without the rotary part."""
QUERIES = OWN * HEADS * 192 * BF16
OUTPUTS = 2 * QUERIES
"""Outputs and their gradient, as wide as keys."""


@pytest.mark.parametrize(
    ("exchange", "keys", "latents", "queries"),
    [
        # Two blocks of latents; gradients of the own block, on their way out and in. Of its own block a rank
        # needs the earlier half twice.
        (ContextExchange.ring, OWN * 3 // 2, OWN * LATENT * (2 * BF16 + 3 * FLOAT32), 5 * QUERIES),
        # The piece from the beginning needs itself, the one from the end all.
        (ContextExchange.all_gather, OWN // 2 + ALL, ALL * LATENT * (BF16 + 2 * FLOAT32), 4 * QUERIES),
    ],
)
def test_keys_of_other_ranks(exchange: ContextExchange, keys: int, latents: int, queries: int) -> None:
    config = compose(["experiment=k25_midtrain_262k"])
    config = replace(config, parallelism=replace(config.parallelism, cp_exchange=exchange))
    taken = keys * LATENT * (BF16 + FLOAT32)
    made = keys * HEADS * PER_HEAD * BF16
    found = shared_key_bytes(config, balanced_sizes(config))
    assert found == latents + taken + made + queries + OUTPUTS


def test_ranks_with_whole_sequences_hold_nothing_of_others() -> None:
    config = compose(["experiment=k25_pretrain_4k"])
    assert shared_key_bytes(config, balanced_sizes(config)) == 0
