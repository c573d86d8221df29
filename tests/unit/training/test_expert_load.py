"""Loads of experts and drift of their biases, counted by hand."""

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import nn

from k25_train.training.expert_load import NO_EXPERTS, ExpertLoad

LAYERS, EXPERTS = 3, 4


class Router(nn.Module):
    """What is read of one."""

    def __init__(self, layer_number: int) -> None:
        super().__init__()
        self.layer_number = layer_number
        self.local_tokens_per_expert = torch.zeros(EXPERTS, dtype=torch.float64)
        self.expert_bias = torch.zeros(EXPERTS)


def load_of(*routers: Router, rank: int = 0) -> ExpertLoad:
    topology: Any = SimpleNamespace(
        groups=SimpleNamespace(dp_cp=SimpleNamespace(rank=lambda: rank)), device=torch.device("cpu")
    )
    model: Any = SimpleNamespace(num_layers=LAYERS, num_experts=EXPERTS)
    return ExpertLoad([nn.ModuleList(routers)], model, topology)


def step(load: ExpertLoad, *counts: tuple[Router, list[float], list[float]]) -> torch.Tensor:
    """What a rank adds up of a step: counts of each router, and its biases after it."""
    for router, tokens, _ in counts:
        router.local_tokens_per_expert.copy_(torch.tensor(tokens))
    with load.around_finalize():
        for router, _, biases in counts:
            router.expert_bias.copy_(torch.tensor(biases))
            router.local_tokens_per_expert.zero_()
    return load.take()


def test_figures_are_of_all_ranks_tokens() -> None:
    # Two ranks with the same layer, and one with another; the first layer has no experts.
    routers = [Router(2), Router(2), Router(3)]
    loads = [load_of(routers[0]), load_of(routers[1], rank=1), load_of(routers[2])]
    total = (
        step(loads[0], (routers[0], [4, 0, 1, 0], [0.5, -0.75, 0, 0]))
        + step(loads[1], (routers[1], [2, 2, 0, 0], [0.5, -0.75, 0, 0]))
        + step(loads[2], (routers[2], [2, 2, 2, 2], [0.25, 0, 0, 0]))
    )
    found = loads[0].figures(loads[0].by_layer(total).tolist())
    assert found.loads == pytest.approx((6 / (9 / 4), 1.0))
    assert (found.dead, found.bias, found.bias_change) == (1, 0.75, 0.75)


def test_each_step_has_its_own() -> None:
    router = Router(1)
    load = load_of(router)
    step(load, (router, [9, 0, 0, 0], [0.5, 0, 0, 0]))
    found = load.figures(load.by_layer(step(load, (router, [1, 1, 1, 1], [0.375, 0, 0, 0]))).tolist())
    assert (found.loads, found.dead, found.bias, found.bias_change) == ((1.0,), 0, 0.375, -0.125)


def test_without_experts_or_tokens_there_is_nothing() -> None:
    load = load_of()
    assert load.figures(load.by_layer(load.take()).tolist()) == NO_EXPERTS
    router = Router(1)
    load = load_of(router)
    assert load.figures(load.by_layer(step(load, (router, [0] * 4, [0.0] * 4))).tolist()) == NO_EXPERTS
