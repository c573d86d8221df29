"""Latents of slots, each at its own length."""

import torch
from torch import Tensor

from k25_train.rollout.engines.in_process.cache import SlotCache

LAYERS, SLOTS, WIDTHS = 2, 3, (4, 2)


def numbers(rows: int, tokens: int, seed: int) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    latents, rotated = (torch.randn(rows, 1, tokens, width, generator=generator) for width in WIDTHS)
    return latents, rotated


def test_prompts_and_tokens_are_kept_at_their_places_while_the_cache_grows() -> None:
    cache = SlotCache(LAYERS, SLOTS, WIDTHS, torch.device("cpu"), torch.float32)
    prompts = [numbers(2, 60, seed=layer) for layer in range(LAYERS)]
    cache.begin_prompts(slice(1, 3), 60)
    for layer, made in enumerate(prompts):
        for seen, new in zip(cache.update(*made, layer), made, strict=True):
            assert torch.equal(seen, new)
    cache.copy(2, 0)
    # The second slot is shorter than its prompt was padded to; the others write behind what is there.
    lengths = torch.tensor([60, 41, 130])
    cache.begin_tokens(lengths, 131)
    assert cache.length >= 131
    for layer, made in enumerate(prompts):
        tokens = numbers(3, 1, seed=10 + layer)
        for seen, prompt, token in zip(cache.update(*tokens, layer), made, tokens, strict=True):
            assert seen.shape[:3] == (3, 1, 131)
            assert torch.equal(seen[0, 0, :60], prompt[1, 0]) and torch.equal(seen[2, 0, :60], prompt[1, 0])
            assert torch.equal(seen[1, 0, :41], prompt[0, 0, :41])
            for row, length in enumerate(lengths.tolist()):
                assert torch.equal(seen[row, 0, length], token[row, 0, 0])
