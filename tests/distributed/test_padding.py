"""Padding reaches nobody: losses, gradients, loads of experts and largest logits of one micro-batch."""

import math
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor

from tests.helpers.ranks import RankContext, run_ranks
from tests.helpers.tiny_model import build_random_model, documents, modules_of, random_tokens

pytestmark = pytest.mark.distributed

REAL, PAD_TOKEN, SEQUENCE = (20, 1, 23), 255, 64
"""Documents of a sequence; the token of padding."""
PLACES: dict[str, tuple[tuple[int, ...], tuple[int, ...]]] = {
    "behind": ((20, 1, 23, 20), (3,)),
    "anywhere": ((3, 20, 4, 1, 6, 23, 7), (0, 2, 4, 6)),
    "and a sequence of nothing else": ((20, 1, 23, 20, 64), (3, 4)),
    "before it": ((64, 20, 1, 23, 20), (0, 4)),
}


@dataclass(frozen=True, slots=True)
class Passed:
    """What a training pass of one micro-batch does."""

    losses: Tensor
    """[T] of the real tokens."""
    gradients: dict[str, Tensor]
    max_logits: list[Tensor]
    """[H] of each layer."""
    loads: list[Tensor]
    """[E] of each layer with experts."""
    rows: list[int]
    """Tokens that arrived at the experts of each of these layers."""


def pass_of(model: Any, lengths: tuple[int, ...], padding: tuple[int, ...]) -> Passed:
    # 1. Real documents of always the same tokens, padding around them.
    is_real = torch.cat([torch.full((n,), i not in padding) for i, n in enumerate(lengths)])
    tokens = torch.full((sum(lengths),), PAD_TOKEN)
    tokens[is_real] = random_tokens(sum(REAL))
    # 2. What layers record.
    attentions, routers = (
        list(modules_of(model, name)) for name in ("DocumentAttention", "SequenceBalancedRouter")
    )
    for attention in attentions:
        attention.record_max_logits, attention.max_logits = True, None
    for router in routers:
        router.local_tokens_per_expert.zero_()
    rows: list[int] = []
    hooks = [
        experts.register_forward_hook(lambda _module, given, _output: rows.append(len(given[0])))
        for experts in modules_of(model, "GroupedExperts")
    ]
    # 3. Forward and backward.
    model.zero_grad()
    losses = model(tokens=tokens, documents=documents(lengths, padding), labels=tokens)
    (losses * is_real).sum().backward()
    for hook in hooks:
        hook.remove()
    return Passed(
        losses[is_real].detach(),
        {name: each.grad.clone() for name, each in language_parameters(model)},
        [attention.max_logits for attention in attentions],
        [router.local_tokens_per_expert.clone() for router in routers],
        rows,
    )


def language_parameters(model: Any) -> list[tuple[str, Any]]:
    return list(model.language_model.named_parameters())


def passes(context: RankContext) -> tuple[dict[str, Passed], Passed]:
    """Passes with padding at several places, and one without any."""
    model = build_random_model(context, balance_loss_coeff=0.5)
    [router, *_] = modules_of(model, "SequenceBalancedRouter")
    router.config.balance_sequence_tokens = SEQUENCE
    found = {name: pass_of(model, *place) for name, place in PLACES.items()}
    router.config.balance_sequence_tokens = sum(REAL)
    return found, pass_of(model, REAL, ())


def test_padding_anywhere_reaches_nobody() -> None:
    [(found, expected)] = run_ranks(passes, 1)
    for place, passed in found.items():
        torch.testing.assert_close(passed.losses, expected.losses, rtol=1e-6, atol=1e-6)
        for name, gradient in expected.gradients.items():
            difference = (passed.gradients[name] - gradient).norm() / gradient.norm()
            assert difference < 1e-6, f"{place}: {name}"
        torch.testing.assert_close(passed.max_logits, expected.max_logits, rtol=1e-6, atol=0)
        assert all(map(torch.equal, passed.loads, expected.loads)), place
        assert passed.rows == [3 * sum(REAL)] * 2, f"{place}: padding goes to experts"


def pass_of_padding_alone(context: RankContext) -> tuple[list[str], list[float], bool]:
    """Parameters that get no gradient from a micro-batch of padding, the sizes of the others, max logits."""
    model = build_random_model(context, balance_loss_coeff=0.5)
    for attention in modules_of(model, "DocumentAttention"):
        attention.record_max_logits = True
    tokens = torch.full((128,), PAD_TOKEN)
    losses = model(tokens=tokens, documents=documents((64, 64), (0, 1)), labels=tokens)
    (losses * 0).sum().backward()
    gradients = {name: each.grad for name, each in language_parameters(model)}
    silent = all(attention.max_logits is None for attention in modules_of(model, "DocumentAttention"))
    sizes = [float(each.abs().max()) for each in gradients.values() if each is not None]
    return [name for name, each in gradients.items() if each is None], sizes, silent


def test_a_micro_batch_of_padding_alone_gives_every_parameter_a_gradient_of_zeros() -> None:
    """With overlapped reduction, a parameter without a gradient would be waited for."""
    [(without, sizes, silent)] = run_ranks(pass_of_padding_alone, 1)
    assert without == []
    assert sizes
    assert not any(sizes)
    assert silent


def recorded(context: RankContext) -> list[list[float]]:
    """What attention records of padding and three documents, with padding known and unknown."""
    [attention, *_] = modules_of(build_random_model(context), "DocumentAttention")
    attention.record_max_logits = True
    generator = torch.Generator().manual_seed(0)
    query, key = (torch.randn(64, 4, 24, generator=generator) for _ in range(2))
    key[:7] = query[:7] = 1e3
    key[-5:] = torch.nan
    lengths, found = (7, 20, 32, 5), []
    for padding in ((0, 3), (0,), (3,)):
        attention.max_logits = None
        attention(query, key, torch.randn(64, 4, 16), documents(lengths, padding))
        found.append(attention.max_logits.tolist())
    return found


def test_attention_records_nothing_of_padding() -> None:
    """However large its logits are; a NaN would pass for an infinite one."""
    [(known, with_nan, with_large)] = run_ranks(recorded, 1)
    assert 0 < max(known) < 10
    assert all(math.isnan(logit) for logit in with_nan)
    assert min(with_large) > 1e6
