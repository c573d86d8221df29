"""What the parts of the stack cost, and what the layout of Kimi K2.5 makes of it."""

import pytest

from k25_train.compose.resolve import compose
from k25_train.config.schema import Config
from k25_train.parameters.released import EXPERTS, count_parameters
from k25_train.plan.pipeline import layout_of
from k25_train.plan.stack_cost import stack_cost
from parallel.pipeline.balance import StackCost, objective
from parallel.pipeline.layout import parse_layout
from tests.helpers.forward_flops import text_forward_flops

NVIDIA = "Et|(tt|)*30L"
"""NVIDIA's layout of 61 layers over 16 ranks with 2 virtual stages (Megatron-Bridge, Kimi K2 and
DeepSeek V3 recipes)."""


def cost_of(config: Config) -> StackCost:
    return stack_cost(config.model, config.train, config.optim, config.cluster, config.parallelism)


@pytest.fixture(scope="module")
def pretrain() -> Config:
    """The report's plan on 256 ranks."""
    return compose(["experiment=k25_pretrain_4k"])


@pytest.mark.parametrize("experiment", ["k25_pretrain_4k", "smoke"])
def test_flops_add_up_to_the_forward_pass(experiment: str) -> None:
    config = compose([f"experiment={experiment}"])
    cost = cost_of(config)
    whole = text_forward_flops(config.model, [config.train.seq_len])
    assert sum(cost.layer_flops) + cost.head_flops == whole


@pytest.mark.parametrize(("dtype", "bytes_per_weight"), [("float32", 4 + 4 + 8), ("bfloat16", 2 + 4 + 12)])
def test_bytes_add_up_to_all_weights_where_nothing_is_sharded(dtype: str, bytes_per_weight: int) -> None:
    alone = ["parallelism=serial", "cluster.gpus_per_node=1", f"train.dtype={dtype}"]
    config = compose(["experiment=smoke", "optim=adamw", *alone])
    cost = cost_of(config)
    counts = count_parameters(config.model)
    held = sum(cost.layer_bytes) + cost.embedding_bytes + cost.head_bytes
    assert held == bytes_per_weight * (counts.total - counts.vision)


def test_experts_are_spread_and_state_is_sharded() -> None:
    """4 data-parallel ranks, of which 2 share the experts: each half of them is on 2 ranks."""
    serial = ["experiment=smoke", "optim=adamw", "parallelism=serial", "train.dtype=bfloat16"]
    config = compose([*serial, "parallelism.ep=2"])
    of = {module.module: module.total for module in count_parameters(config.model).modules}
    cost = cost_of(config)
    table = of["embedding"]
    assert cost.embedding_bytes == table * (2 + 4) + table * 12 // 4
    experts = of[EXPERTS] // 4  # of one layer: 4 of the 5 have experts
    without = cost_of(compose(serial))
    half = experts // 2 * (2 + 4 + 12 // 2)
    assert cost.layer_bytes[1] == without.layer_bytes[1] - experts * (2 + 4 + 12 // 4) + half
    assert cost.layer_bytes[0] == without.layer_bytes[0]


def test_muon_remembers_half_of_what_adamw_does() -> None:
    """One float32 a weight less for matrices; embedding and output head stay with AdamW."""
    alone = ["experiment=smoke", "parallelism=serial", "cluster.gpus_per_node=1"]
    adamw, muon = (cost_of(compose([*alone, f"optim={name}"])) for name in ("adamw", "muonclip"))
    assert (muon.embedding_bytes, muon.head_bytes) == (adamw.embedding_bytes, adamw.head_bytes)
    of = {module.module: module.total for module in count_parameters(compose(alone).model).modules}
    parts = sum(of[name] for name in ("attention", "dense FFN", "router", EXPERTS, "shared experts"))
    latent_norms = 5 * (64 + 32)
    assert sum(adamw.layer_bytes) - sum(muon.layer_bytes) == 4 * (parts - latent_norms)


def test_layers_of_kimi_k25_cost_alike_and_the_head_as_much_as_two(pretrain: Config) -> None:
    cost = cost_of(pretrain)
    dense, moe = cost.layer_flops[0], cost.layer_flops[1]
    assert set(cost.layer_flops[1:]) == {moe}
    # 18432 = 9 x 2048: the dense layer is as wide as 8 experts and the shared one. The router is on top.
    assert dense / moe == pytest.approx(0.995, abs=5e-4)
    assert cost.head_flops / moe == pytest.approx(2.17, abs=5e-3)
    without_attention = 2 * 4096 * (101_122_048 + 3 * 7168 * 18432)
    assert cost.head_flops / without_attention == pytest.approx(2.36, abs=5e-3)


def test_kimi_k25_is_laid_out_better_than_by_hand(pretrain: Config) -> None:
    cost = cost_of(pretrain)
    ours = layout_of(pretrain)
    assert ours == parse_layout("Ett|(tt|)*14t|(tt|)*15L", 61, 16, 2)
    by_hand = parse_layout(NVIDIA, 61, 16, 2)
    layer = cost.layer_flops[1]
    busiest_rank, busiest_chunk, fullest_rank, _ = objective(cost, ours)
    assert busiest_rank / layer == 4.0
    assert busiest_chunk == cost.head_flops
    assert objective(cost, by_hand)[0] / layer == pytest.approx(4.17, abs=5e-3)
    assert objective(cost, by_hand)[1:3] == (busiest_chunk, fullest_rank)
    assert objective(cost, ours) < objective(cost, by_hand)


def test_a_written_layout_is_taken_as_it_is() -> None:
    config = compose(["experiment=smoke", "parallelism.layout='Et|t|tt|tL'"])
    assert layout_of(config).to_megatron() == "Et|t|tt|tL"
    assert layout_of(compose(["experiment=smoke"])).to_megatron() == "Ett|t|tt|L"
