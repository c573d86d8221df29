"""Kernels of layers and heads: their FLOPs are the model's, their bytes what ranks send and policies move."""

from collections.abc import Iterable
from dataclasses import replace
from functools import cache

import pytest

from k25_train.compose.resolve import compose
from k25_train.config.schema import Config
from k25_train.plan.assumptions import AS_CONFIGURED, Assumptions, Compute, OtherCode
from k25_train.plan.cause import Cause
from k25_train.plan.expert_copies import EXCHANGES
from k25_train.plan.flops import head_forward_flops, layer_forward_flops, mtp_forward_flops
from k25_train.plan.kernels.ends import before_mtp, head
from k25_train.plan.kernels.kernel import Moved, Precision
from k25_train.plan.kernels.layer import LayerKernels, kernels_of_kind, layer_kernels
from k25_train.plan.kernels.work import Phase, Setting, Work
from k25_train.plan.memory.offload import need_of
from k25_train.plan.pipeline import PipelinePlan, plan_pipeline
from k25_train.plan.time.communication import communication
from k25_train.plan.time.expert_exchange import expert_exchange
from parallel.pipeline.schedule import BACKWARD_COST

K25 = ("experiment=k25_pretrain_4k",)
KEPT = (*K25, "activation=keep")


@cache
def composed(*overrides: str) -> Config:
    return compose([*overrides])


def pipeline_of(*overrides: str, assumptions: Assumptions = AS_CONFIGURED) -> PipelinePlan:
    return plan_pipeline(composed(*overrides), assumptions=assumptions)


def works_of(kernels: LayerKernels) -> list[Work]:
    return [work for part in kernels.parts for work in part.works]


def flops_of(works: Iterable[Work], *phases: Phase) -> float:
    return sum(each.kernel.flops for each in works if each.cause is Cause.compute and each.phase in phases)


def bytes_of(works: Iterable[Work], cause: Cause) -> float:
    return sum(
        each.kernel.total_bytes for each in works if each.cause is cause and isinstance(each.kernel, Moved)
    )


@pytest.mark.parametrize(
    "overrides",
    [
        K25,
        KEPT,
        ("experiment=moonlight_16b",),
        ("experiment=moonlight_16b", "model=qwen3_30b_a3b"),
        ("experiment=smoke",),
        ("experiment=k25_pretrain_4k", "parallelism.dispatcher=hybridep"),
    ],
)
def test_flops_are_the_models(overrides: tuple[str, ...]) -> None:
    """Whatever policies compute again, and however documents are cut."""
    assumptions = Assumptions(document_tokens=96)
    pipeline = pipeline_of(*overrides, assumptions=assumptions)
    model, stage = pipeline.config.model, pipeline.stages[0]
    for layer in (0, model.num_layers - 1):
        forward = layer_forward_flops(model, layer, stage.balanced_sizes.documents)
        works = works_of(layer_kernels(stage, layer))
        assert flops_of(works, Phase.forward) == forward
        assert flops_of(works, Phase.backward, Phase.weights) == BACKWARD_COST * forward
        assert sum(part.model_flops for part in layer_kernels(stage, layer).parts) == 3 * forward


def test_flops_of_heads_and_multi_token_prediction_are_the_models() -> None:
    pipeline = pipeline_of(*K25)
    setting, model = Setting.of(pipeline.stages[0]), pipeline.config.model
    works = [*head(setting)]
    assert flops_of(works, Phase.forward) == head_forward_flops(model, 4096)
    pairs = 4096 * 4097 // 2
    works += [*before_mtp(setting), *works_of(kernels_of_kind(setting, 60, is_moe=True))]
    assert flops_of(works, *Phase) == 3 * mtp_forward_flops(model, 4096, pairs)


def test_weights_gradients_are_half_of_a_backward_pass_but_for_attention() -> None:
    pipeline = pipeline_of(*K25)
    works = works_of(layer_kernels(pipeline.stages[0], 5))
    of_attention = sum(
        each.kernel.flops
        for each in works
        if each.cause is Cause.compute and each.kernel.name == "attention, backward"
    )
    by_input = flops_of(works, Phase.backward) - of_attention
    assert flops_of(works, Phase.weights) == by_input


def test_policies_move_and_compute_what_they_name() -> None:
    """K2's choice against keeping everything: up-projections once more, and casts of two tensors."""
    kept, packed = (
        works_of(layer_kernels(pipeline_of(*overrides, "optim=adamw").stages[0], 5))
        for overrides in (KEPT, (*K25, "activation=k2"))
    )
    assert not [each for each in kept if not each.cause.is_of_model]
    again = sum(each.kernel.flops for each in packed if each.cause is Cause.recompute)
    # 64 heads: queries of 192 from 1,536, keys and values of 128 from 512.
    assert again == 2 * 4096 * 64 * (1536 * 192 + 512 * 256)
    rows, tokens = 8 * 4096, 4096
    elements = rows * (7168 + 2 * 2048) + tokens * 2 * 2048
    # Read in bfloat16, written as a byte and a 32nd of one for scales; and back.
    assert bytes_of(packed, Cause.storage) == pytest.approx(2 * elements * (2 + 1 + 4 / 128))
    # Nothing else changes.
    assert bytes_of(packed, Cause.memory_bound) == bytes_of(kept, Cause.memory_bound)


def test_bytes_for_the_host_are_what_the_offload_engine_copies() -> None:
    pipeline = pipeline_of(*K25)
    stage = pipeline.stages[1]
    of_layers = sum(
        layer_kernels(stage, layer).host_bytes for chunk in stage.chunks for layer in chunk.layers
    )
    # The engine also copies what a chunk saves once.
    of_stage = need_of(stage, stage.balanced_sizes).micro_batch_bytes
    assert 0.99 * of_stage < of_layers <= of_stage


def test_logits_are_taken_once_more_in_the_steps_that_clip() -> None:
    works = works_of(layer_kernels(pipeline_of(*K25).stages[0], 5))
    (logits,) = [each for each in works if each.kernel.name == "largest logits"]
    assert logits.kernel.flops == 2 * (4096 * 4097 / 2) / 8 * 64 * 192
    assert not [
        each
        for each in works_of(layer_kernels(pipeline_of(*K25, "optim=adamw").stages[0], 5))
        if each.kernel.name == "largest logits"
    ]


def test_a_head_by_pieces_makes_its_logits_once_more() -> None:
    config = composed(*K25)
    whole, by_pieces = (
        list(head(Setting.of(pipeline_of(*K25, *more).stages[-1])))
        for more in ((), ("activation.head.logits=recompute",))
    )
    assert flops_of(by_pieces, *Phase) == pytest.approx(flops_of(whole, *Phase))
    again = [each.kernel.flops for each in by_pieces if each.cause is Cause.recompute and each.kernel.flops]
    # 1 GiB of logits is less than 4,096 tokens have.
    assert again == [head_forward_flops(config.model, config.train.seq_len) / 2] * 2


def test_others_code_computes_in_fp8_and_fuses() -> None:
    plain = works_of(layer_kernels(pipeline_of(*KEPT).stages[0], 5))
    code = OtherCode(compute=Compute.fp8, fused_elementwise=True)
    assumed = Assumptions(code=code)
    others = works_of(layer_kernels(pipeline_of(*KEPT, assumptions=assumed).stages[0], 5))
    in_fp8 = {each.kernel.name for each in others if each.precision is Precision.fp8}
    assert "experts: up" in in_fp8
    # Router and attention stay as they are.
    assert not [name for name in in_fp8 if "router" in name or name.startswith("attention,")]
    assert flops_of(others, *Phase) == flops_of(plain, *Phase)
    # Experts of one kernel round and activate within it; attention may be in FP8, too.
    code = replace(code, fuses_experts=True, attention_in_fp8=True)
    assumed = Assumptions(code=code)
    fused = works_of(layer_kernels(pipeline_of(*KEPT, assumptions=assumed).stages[0], 5))
    names = {each.kernel.name for each in fused}
    assert not names & {"experts: SwiGLU", "experts: down, in FP8"}
    assert "attention" in {each.kernel.name for each in fused if each.precision is Precision.fp8}
    assert bytes_of(fused, Cause.memory_bound) < bytes_of(others, Cause.memory_bound)
    # What is sent in FP8 needs no cast where it arrives.
    code = replace(code, fuses_experts=False, dispatch_bytes=1)
    sent = works_of(layer_kernels(pipeline_of(*KEPT, assumptions=Assumptions(code=code)).stages[0], 5))
    assert "experts: up, in FP8" not in {each.kernel.name for each in sent}
    assert bytes_of(sent, Cause.memory_bound) < bytes_of(others, Cause.memory_bound)
    launches, of_others = (sum(each.kernel.num_launches for each in works) for works in (plain, others))
    assert of_others < launches


@pytest.mark.parametrize("dispatcher", ["alltoall", "hybridep"])
def test_exchanges_send_what_all_ranks_send_in_a_step(dispatcher: str) -> None:
    """`communication` counts all copies that leave ranks: where NVLink connects none, the network's."""
    config = composed(*K25, f"parallelism.dispatcher={dispatcher}")
    rates = replace(config.cluster.rates, nvlink_ranks=1)
    alone = replace(config, cluster=replace(config.cluster, rates=rates))
    passes = config.model.num_moe_layers * config.train.global_batch_size
    sent = EXCHANGES * passes * expert_exchange(alone).network_bytes
    assert sent == pytest.approx(communication(config)["all-to-all"].sent_bytes)
    # Within a node NVLink carries its share.
    within = expert_exchange(config)
    if dispatcher == "alltoall":
        in_all = within.network_bytes + within.nvlink_bytes
        assert in_all == pytest.approx(expert_exchange(alone).network_bytes)
    else:
        # What has come over the network is spread in the node.
        of_rank = within.received_rows * 7168 * 2
        assert within.nvlink_bytes == pytest.approx(of_rank * 7 / 8)
    assert within.network_bytes < expert_exchange(alone).network_bytes


def test_a_rack_of_nvlink_leaves_the_network_alone() -> None:
    config = composed(*K25)
    rates = replace(config.cluster.rates, nvlink_ranks=72)
    in_rack = expert_exchange(replace(config, cluster=replace(config.cluster, rates=rates)))
    assert in_rack.network_bytes == in_rack.network_s == 0.0
    assert in_rack.seconds < expert_exchange(config).seconds


def test_nodes_of_half_the_usual_size_are_connected_by_the_network() -> None:
    """A device's file has NVLink for 8; with 4 to a node, that is still within the node."""
    config = composed(*K25)
    halves = replace(config, cluster=replace(config.cluster, nodes=64, gpus_per_node=4))
    of_halves, whole = expert_exchange(halves), expert_exchange(config)
    assert of_halves.network_bytes == pytest.approx(whole.network_bytes * (3 / 4) / (1 / 2))
    assert of_halves.nvlink_bytes == pytest.approx(whole.nvlink_bytes * 3 / 7)


def test_assumptions_change_exchanges() -> None:
    config = composed(*K25)
    even = expert_exchange(config)
    busiest = expert_exchange(config, Assumptions(expert_imbalance=1.5))
    assert busiest.network_s == pytest.approx(1.5 * even.network_s)
    assert busiest.network_bytes == even.network_bytes
    shared = expert_exchange(composed(*K25, "parallelism.cp=4"))
    assert shared.network_bytes == even.network_bytes / 4
    assert expert_exchange(config, element_bytes=1).network_bytes == even.network_bytes / 2


def test_a_router_that_chooses_among_few_nodes_sends_less() -> None:
    config = composed(*K25, "parallelism.dispatcher=hybridep", "cluster.nodes=256", "parallelism.ep=128")
    any_node, few = (
        expert_exchange(config, Assumptions(code=OtherCode(most_nodes=most))) for most in (None, 4)
    )
    # 16 nodes: of 4 all but a sixteenth are elsewhere.
    assert few.network_bytes == 4096 * 4 * 15 / 16 * 7168 * 2
    assert few.network_bytes < any_node.network_bytes
    # What is sent to each expert is not bounded so.
    alltoall = composed(*K25)
    assert expert_exchange(alltoall, Assumptions(code=OtherCode(most_nodes=1))) == expert_exchange(alltoall)


def test_grouped_experts_get_the_busiest_ranks_rows() -> None:
    pipeline = pipeline_of(*K25, assumptions=Assumptions(expert_imbalance=1.5))
    works = works_of(layer_kernels(pipeline.stages[0], 5))
    (up,) = [each.kernel for each in works if each.kernel.name == "experts: up"]
    assert up.count == 24
    assert up.m * up.count == 1.5 * 8 * 4096
