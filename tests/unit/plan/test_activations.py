"""The plan's list of saved tensors against what autograd saves, to the byte; budgets; what ranks hold."""

from collections import Counter
from collections.abc import Mapping

import pytest
import torch

from k25_train.compose.resolve import compose
from k25_train.config.activation import CAN_RECOMPUTE, CAN_ROUND
from k25_train.config.basics import DType
from k25_train.config.cluster import Device
from k25_train.config.model import ModelConfig
from k25_train.plan.memory.activations import pack
from k25_train.plan.memory.kernels import kernels_of
from k25_train.plan.memory.saved_tensors import SavedTensors
from k25_train.plan.pass_sizes import PassSizes
from parallel.activations.policy import Policy
from parallel.config import ContextExchange
from parallel.context.plan import plan_context
from tests.helpers.autograd_saves import (
    Case,
    Record,
    records_of_cases,
    records_of_shared_cases,
    records_without_memory,
    vision_bytes,
)
from tests.helpers.hf_reference import tiny_model_config
from tests.helpers.ranks import run_ranks
from tests.helpers.tiny_model import LENGTHS

DTYPES = {torch.float32: DType.float32, torch.bfloat16: DType.bfloat16}
MODELS: dict[str, dict[str, float]] = {
    "tiny": {},
    "one expert per token, no balance loss": {"num_experts_per_token": 1, "balance_loss_coeff": 0.0},
    "wide": {"hidden_size": 136, "qk_nope_head_dim": 144, "v_head_dim": 130, "num_shared_experts": 2},
}
POLICIES = {
    choice: compose(["experiment=smoke", f"activation={choice}"]).activation.policies()
    for choice in ("keep", "selective", "k2", "k2_fp8_offload")
}


def choices() -> dict[str, dict[str, Policy]]:
    """What to do with each activation: every recipe, everything alike, and each name's every policy alone."""
    found = dict(POLICIES)
    for policy in Policy:
        found[f"all {policy.value}"] = {
            name: policy if is_allowed(name, policy) else Policy.keep for name in POLICIES["keep"]
        }
        for name in POLICIES["keep"]:
            if policy is not Policy.keep and is_allowed(name, policy):
                found[f"{name}={policy.value}"] = POLICIES["keep"] | {name: policy}
    return found


def is_allowed(name: str, policy: Policy) -> bool:
    if policy is Policy.recompute:
        return name in CAN_RECOMPUTE
    return name in CAN_ROUND or not policy.compresses


def planned(
    model: ModelConfig,
    case: Case,
    *,
    device: Device = Device.cpu,
    transformer_engine: bool = False,
    sequence_tokens: int = 64,
    cp: int = 1,
    padding_tokens: int | None = None,
) -> Counter[Record]:
    """What the plan says that a pass through the whole model stores."""
    # Of the rank, one of `cp` that share the micro-batch.
    padding = case.num_padding if padding_tokens is None else padding_tokens
    sizes = PassSizes(
        documents=case.lengths,
        padding_tokens=padding,
        num_sequences=sum(case.lengths) // sequence_tokens,
        expert_rows=(sum(case.lengths) // cp - padding) * model.num_experts_per_token,
        local_experts=model.num_experts,
        patches=0,
        vision_tokens=0,
        cp=cp,
    )
    kernels = kernels_of(device, DTYPES[case.dtype], transformer_engine=transformer_engine)
    lists = SavedTensors(model, DTYPES[case.dtype], kernels, case.policies, sizes)
    saved = [*lists.first_chunk(), *lists.every_chunk(range(model.num_layers)), *lists.last_chunk()]
    for layer in range(model.num_layers):
        saved += lists.layer(is_moe=layer >= model.num_dense_layers)
    packed = [pack(tensor, case.policies[tensor.name], offloads=not case.stays) for tensor in saved]
    return Counter(
        (each.tensor.name, each.tensor.shape, each.policy, each.device_bytes, each.host_bytes)
        for each in packed
    )


def assert_alike(expected: Counter[Record], found: Counter[Record], what: str) -> None:
    assert found == expected, f"{what}: only in the plan {expected - found}, only saved {found - expected}"


@pytest.fixture(scope="module")
def records() -> Mapping[tuple[torch.dtype, str], Counter[Record]]:
    """(dtype, choice) -> what the tiny model stores of a sequence of several documents."""
    cases = {
        (dtype, name): Case(policies, dtype, LENGTHS)
        for dtype in DTYPES
        for name, policies in choices().items()
    }
    found = run_ranks(records_of_cases, 1, list(cases.values()), {})[0]
    return dict(zip(cases, found, strict=True))


@pytest.mark.parametrize("choice", choices())
@pytest.mark.parametrize("dtype", DTYPES, ids=["float32", "bfloat16"])
def test_plan_lists_what_autograd_saves(
    records: Mapping[tuple[torch.dtype, str], Counter[Record]], dtype: torch.dtype, choice: str
) -> None:
    case = Case(choices()[choice], dtype, LENGTHS)
    assert_alike(planned(tiny_model_config(), case), records[dtype, choice], choice)


@pytest.mark.parametrize("overrides", MODELS.values(), ids=list(MODELS))
def test_plan_holds_for_other_models_documents_and_padding(overrides: dict[str, float]) -> None:
    cases = [
        Case(policies, dtype, lengths, stays, padding)
        for dtype in DTYPES
        for policies in (POLICIES["keep"], POLICIES["k2"])
        for lengths, padding in (((64,), ()), ((192,), ()), ((1,) * 64, ()), ((40, 24), ()), ((40, 24), (1,)))
        for stays in (False, True)
    ]
    model = tiny_model_config(**overrides)
    found = run_ranks(records_of_cases, 1, cases, overrides)[0]
    for case, saved in zip(cases, found, strict=True):
        what = f"{case.dtype}, documents of {case.lengths}, padding {case.padding}"
        assert_alike(planned(model, case), saved, what)


@pytest.mark.parametrize("exchange", ContextExchange, ids=lambda each: each.value)
def test_plan_lists_what_ranks_save_that_share_sequences(exchange: ContextExchange) -> None:
    cases = [
        Case(policies, dtype, lengths, False, padding)
        for dtype in DTYPES
        for policies in POLICIES.values()
        for lengths, padding in ((LENGTHS, ()), ((512,), ()), ((470, 42), (1,)))
    ]
    by_rank = run_ranks(records_of_shared_cases, 2, cases, exchange)
    for number, case in enumerate(cases):
        plan = plan_context(case.lengths, case.padding, 2)
        for rank, found in enumerate(by_rank):
            padding = sum(each.num_tokens for each in plan.pieces[rank] if each.document in case.padding)
            expected = planned(tiny_model_config(), case, cp=2, padding_tokens=padding)
            assert_alike(expected, found[number], f"rank {rank}, {case.dtype}, documents of {case.lengths}")


@pytest.mark.parametrize("dtype", DTYPES, ids=["float32", "bfloat16"])
def test_vision_in_the_first_chunk_saves_no_more_than_planned(dtype: torch.dtype) -> None:
    """And not much less. What is not counted: weights by which the table of positions is resampled."""
    grids = [[(1, 16, 16)], [(4, 8, 8), (1, 8, 8)], [(1, 12, 8), (2, 10, 10), (1, 12, 8)]]
    model = tiny_model_config()
    for grid_thw, found in zip(grids, run_ranks(vision_bytes, 1, grids, dtype)[0], strict=True):
        sizes = PassSizes(
            documents=(64,),
            padding_tokens=0,
            num_sequences=1,
            expert_rows=1,
            local_experts=1,
            patches=sum(t * h * w for t, h, w in grid_thw),
            vision_tokens=sum(h * w // 4 for _, h, w in grid_thw),
        )
        kernels = kernels_of(Device.cpu, DTYPES[dtype], transformer_engine=False)
        lists = SavedTensors(model, DTYPES[dtype], kernels, POLICIES["keep"], sizes)
        bound = sum(each.num_bytes for each in lists.first_chunk() if each.name == "vision.encoder")
        resampling = sum(4 * 16 * (h + w) for _, h, w in grid_thw)
        assert 0.8 * bound < found <= bound + resampling


@pytest.mark.parametrize("seq_len", [4096, 16384])
def test_plan_holds_for_the_real_model(seq_len: int) -> None:
    """A dense and a MoE layer, embedding and head of Kimi K2.5, with CUDA's kernels and without memory."""
    one_rank = ["parallelism=serial", "cluster.nodes=1", "cluster.gpus_per_node=1"]
    sizes = ["model.num_layers=2", f"train.seq_len={seq_len}", "model.rope.scaling_factor=64"]
    overrides = ["experiment=k25_pretrain_4k", *one_rank, *sizes, "train.transformer_engine=false"]
    cases = [
        Case(policies, torch.bfloat16, lengths, stays)
        for name, policies in choices().items()
        for stays in (False, True)
        for lengths in ((seq_len,), (1000, 3, seq_len - 1003))
        if name in POLICIES or name.startswith("all ")
    ]
    model = compose(overrides).model
    found = run_ranks(records_without_memory, 1, cases, overrides)[0]
    for case, saved in zip(cases, found, strict=True):
        expected = planned(model, case, device=Device.cuda, sequence_tokens=seq_len)
        assert_alike(expected, saved, f"documents of {case.lengths}, stays {case.stays}")
