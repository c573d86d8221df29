"""Experts and their balance against plain formulas."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from tests.helpers.ranks import RankContext, run_ranks
from tests.helpers.runs import layout, overrides, start_run
from tests.helpers.tiny_model import build_random_model, expert_loop, modules_of

pytestmark = pytest.mark.distributed


def compare_experts(context: RankContext, counts: list[int]) -> list[tuple[Tensor, Tensor]]:
    """(grouped, loop) of the output and of every gradient."""
    [experts, *_] = modules_of(build_random_model(context), "GroupedExperts")
    generator = torch.Generator().manual_seed(2)
    tokens = torch.randn(sum(counts), 64, generator=generator, requires_grad=True)
    weights = torch.rand(sum(counts), generator=generator, requires_grad=True)
    weighting = torch.randn(sum(counts), 64, generator=generator)
    inputs = [tokens, weights, experts.gate_up_proj, experts.down_proj]
    grouped, no_bias = experts(tokens, torch.tensor(counts), weights)
    assert no_bias is None
    found = [grouped, *torch.autograd.grad((grouped * weighting).sum(), inputs)]
    loop = expert_loop(tokens, counts, weights, experts.gate_up_proj, experts.down_proj)
    expected = [loop, *torch.autograd.grad((loop * weighting).sum(), inputs)]
    return [(a.detach(), b.detach()) for a, b in zip(found, expected, strict=True)]


@pytest.mark.parametrize(
    "counts",
    [
        [5, 9, 1, 30, 4, 7, 2, 6],
        [0, 0, 13, 0, 40, 1, 0, 0],
        [64, 0, 0, 0, 0, 0, 0, 0],
        [0, 0, 0, 0, 0, 0, 0, 64],
        [0] * 8,
    ],
    ids=["all busy", "some empty", "only the first", "only the last", "no tokens"],
)
def test_grouped_experts_equal_a_loop_over_experts(counts: list[int]) -> None:
    for grouped, loop in run_ranks(compare_experts, 1, counts)[0]:
        assert grouped.shape == loop.shape
        torch.testing.assert_close(
            grouped, loop, rtol=1e-6, atol=1e-6 * max(1.0, float(loop.abs().sum() > 0))
        )


def balance_loss(logits: Tensor, num_chosen: int, coefficient: float) -> Tensor:
    """Equations 17 to 20 of the DeepSeek-V3 report (arXiv 2412.19437) for one sequence's logits [T, E]."""
    num_tokens, num_experts = logits.shape
    affinity = logits.sigmoid()
    chosen = torch.zeros_like(affinity).scatter(1, affinity.topk(num_chosen, dim=1).indices, 1.0)
    frequency = num_experts / (num_chosen * num_tokens) * chosen.sum(0)
    probability = (affinity / affinity.sum(1, keepdim=True)).mean(0)
    return coefficient * (frequency * probability).sum()


PADDING = {
    "none": (),
    "at ends": ((50, 64), (100, 128)),
    "anywhere": ((0, 3), (30, 41), (63, 70), (128, 192)),
}
"""Ranges of padding among the tokens of four sequences of 64."""


def router_gradients(context: RankContext, padding: Sequence[tuple[int, int]]) -> dict[str, Tensor]:
    """Gradient of the balance loss alone, summed over 4 sequences cut into micro-batches in three ways."""
    [router, *_] = modules_of(build_random_model(context, balance_loss_coeff=0.5), "SequenceBalancedRouter")
    # The bias steers the choice of experts; the report's frequencies are those of the unbiased choice.
    router.expert_bias.copy_(torch.linspace(-1, 1, 8))
    tokens = router.config.balance_sequence_tokens
    hidden = torch.randn(4 * tokens, 1, 64, generator=torch.Generator().manual_seed(1))
    hidden = hidden + torch.linspace(0, 1, 4).repeat_interleave(tokens).view(-1, 1, 1)
    is_padding = torch.zeros(4 * tokens, 1, dtype=torch.bool)
    for start, stop in padding:
        is_padding[start:stop] = True
        hidden[start:stop] = 1000.0
    found = {}
    for num_sequences in (1, 2, 4):
        router.weight.grad = None
        router.local_tokens_per_expert.zero_()
        parts = zip(*(each.split(num_sequences * tokens) for each in (hidden, is_padding)), strict=True)
        for micro_batch, router.is_padding in parts:
            probs, routing_map = router(micro_batch)
            assert torch.equal(routing_map.sum(1, keepdim=True), torch.where(router.is_padding, 0, 3))
            (probs * 0).sum().backward()
        assert router.local_tokens_per_expert.sum() == 3 * (~is_padding).sum()
        found[f"cut into {num_sequences}"] = router.weight.grad
    weight = router.weight.detach().requires_grad_()
    # Each sequence weighs as many tokens as it has: the schedule divides by the tokens of the global batch.
    kept = [part[~its] for part, its in zip(hidden.split(tokens), is_padding.split(tokens), strict=True)]
    losses = [len(part) * balance_loss(part @ weight.T, 3, 0.5) for part in kept if len(part)]
    torch.stack(losses).sum().backward()
    return found | {"formula": weight.grad}


@pytest.mark.parametrize("padding", PADDING.values(), ids=list(PADDING))
def test_the_balance_loss_is_the_reports_whatever_the_micro_batch_size(
    padding: Sequence[tuple[int, int]],
) -> None:
    gradients = run_ranks(router_gradients, 1, padding)[0]
    formula = gradients.pop("formula")
    assert formula.abs().max() > 0.1
    for gradient in gradients.values():
        torch.testing.assert_close(gradient, formula, rtol=1e-5, atol=1e-5)


def count_tokens(router: torch.nn.Module) -> Tensor:
    """Numbers of tokens [E] that every expert of a layer gets in training passes from here on."""
    count = torch.zeros(4)

    def add(module: torch.nn.Module, _arguments: Any, output: tuple[Tensor, Tensor]) -> None:
        if module.training:
            count.add_(output[1].sum(0))

    router.register_forward_hook(add)
    return count


def biases_after_a_step(context: RankContext, arguments: list[str]) -> tuple[list[Tensor], list[Tensor], int]:
    """Of each layer, expert biases and the tokens that each expert got over all ranks; tokens of the step."""
    import torch.distributed as dist

    from k25_train.training.evaluation import eval_losses
    from k25_train.training.step import train_step

    run = start_run(context, arguments)
    routers = [router for chunk in run.chunks for router in modules_of(chunk, "SequenceBalancedRouter")]
    counts = [count_tokens(router) for router in routers]
    with run.data:
        eval_losses(run, 4)
        train_step(run, 1)
        eval_losses(run, 4)
    for count in counts:
        dist.all_reduce(count)
    assert all(router.local_tokens_per_expert.dtype is torch.float64 for router in routers)
    return [router.expert_bias for router in routers], counts, run.data.loader.plan(0).sizes().num_tokens


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_expert_biases_move_against_the_load_of_the_global_batch(
    dtype: str, data: Path, tmp_path: Path
) -> None:
    arguments = overrides(data, tmp_path, *layout(ep=2, dp=2), f"train.dtype={dtype}")
    by_rank = run_ranks(biases_after_a_step, 2, arguments)
    for biases, counts, num_tokens in by_rank:
        assert len(biases) == 4
        for bias, count in zip(biases, counts, strict=True):
            assert count.sum() == 3 * num_tokens < 3 * 8 * 128, "each token has 3 experts, and padding none"
            torch.testing.assert_close(bias, 0.001 * (count.mean() - count).sign(), rtol=1e-6, atol=0)
    assert all(torch.equal(a, b) for a, b in zip(by_rank[0][0], by_rank[1][0], strict=True))


def train_with_experts_of_first_rank_only(
    context: RankContext, arguments: list[str]
) -> list[tuple[float, float]]:
    """Loss and gradient norm of three steps in which every token chooses experts 0 and 1 of 4."""
    from k25_train.training.step import train_step

    run = start_run(context, arguments)
    for chunk in run.chunks:
        for router in modules_of(chunk, "SequenceBalancedRouter"):
            router.expert_bias[:2] += 100.0
    with run.data:
        results = [train_step(run, step) for step in (1, 2, 3)]
    return [(result.loss, result.grad_norm) for result in results]


@pytest.mark.parametrize("overlap", ["false", "true"])
def test_a_rank_whose_experts_get_no_token_takes_part_in_every_exchange(
    overlap: str, data: Path, tmp_path: Path
) -> None:
    flags = (f"parallelism.overlap_expert_comm={overlap}", f"parallelism.delay_wgrad={overlap}")
    alone, *_ = run_ranks(train_with_experts_of_first_rank_only, 1, overrides(data, tmp_path, *layout()))
    shared, *_ = run_ranks(
        train_with_experts_of_first_rank_only, 2, overrides(data, tmp_path, *layout(ep=2, dp=2), *flags)
    )
    torch.testing.assert_close(torch.tensor(shared), torch.tensor(alone), rtol=1e-5, atol=0)


def norms_of_a_step(context: RankContext, arguments: list[str]) -> tuple[float, float]:
    """The gradient's norm before clipping, as reported, and afterwards, as float64 has it."""
    import torch.distributed as dist

    from k25_train.training.step import train_step

    run = start_run(context, arguments)
    with run.data:
        result = train_step(run, 1)
    shards = [shard for part in run.optimizer.chained_optimizers for shard in part.shards().values()]
    squares = torch.stack([shard.gradient.double().square().sum() for shard in shards]).sum()
    dist.all_reduce(squares, group=run.optimizer.get_grad_stats_parallel_group())
    return result.grad_norm, float(squares.sqrt())


def test_the_norm_of_many_experts_does_not_depend_on_the_layout(data: Path, tmp_path: Path) -> None:
    """Tensors of a million elements; one expert for each token."""
    many = (
        "model.num_experts=256",
        "model.num_experts_per_token=1",
        "model.num_layers=3",
        "optim.grad_clip=0.5",
    )
    (alone, *_), (shared, *_) = (
        run_ranks(norms_of_a_step, num_ranks, overrides(data, tmp_path, *layout(**sizes), *many))
        for num_ranks, sizes in ((1, {}), (2, {"ep": 2, "dp": 2}))
    )
    assert alone[0] > 1
    assert shared == pytest.approx(alone, rel=1e-7)
    # Clipping divides by the norm and another 1e-6.
    assert alone[1] == pytest.approx(0.5, rel=2e-6)
