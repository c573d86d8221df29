"""What the passes of a real schedule save on each rank, against the plan's list and its walk over them."""

import math
from collections import Counter, defaultdict
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import pytest

from k25_train.compose.resolve import compose
from k25_train.plan.memory.activations import pack_all, peak_held, saved_tensors
from k25_train.plan.memory.offload import offload_budget
from k25_train.plan.pass_sizes import largest_sizes
from k25_train.plan.pipeline import StagePlan, plan_pipeline
from parallel.activations.order import offload_order
from parallel.activations.policy import Policy
from parallel.activations.saving_pass import SaveRecord, SavingPass
from parallel.activations.sizes import block_bytes
from parallel.pipeline.schedule import PassKey
from tests.helpers.autograd_saves import Record, record_of
from tests.helpers.ranks import RankContext, run_ranks
from tests.helpers.runs import layout, overrides, start_run

pytestmark = pytest.mark.distributed

OVERLAP = ["parallelism.overlap_expert_comm=true", "parallelism.delay_wgrad=true"]
LAYOUTS = {
    "pp2 vpp2": (2, layout(pp=2, vpp=2)),
    "pp2 vpp2 direct query, head by pieces": (
        2,
        [*layout(pp=2, vpp=2), "model.q_lora_rank=null", "activation.head.logits=recompute"],
    ),
    "pp2 vpp2 ep2 overlap": (4, [*layout(pp=2, vpp=2, ep=2, dp=2), *OVERLAP]),
}
OFFLOADING = ["activation=k2", "activation.moe.up_input=fp8+offload", "activation.moe.swiglu_input=offload"]


@dataclass(frozen=True, slots=True)
class Observed:
    """What one rank did in a step."""

    stored: dict[PassKey, list[Record]]
    """Each pass's, in order."""
    host_bytes: int
    """The most host memory in use at a time."""


def observe_a_step(context: RankContext, arguments: Sequence[str]) -> Observed:
    """Run the first step and note what every pass stores."""
    run = start_run(context, arguments)
    from k25_train.training.step import train_step

    stored: dict[PassKey, list[SaveRecord]] = defaultdict(list)
    peaks: list[int] = []
    manager = run.activations.manager
    forward_pass, finish_step = manager.forward_pass, manager.finish_step

    def observed_pass(key: PassKey) -> SavingPass:
        saving = forward_pass(key)
        saving._observe = stored[key].append
        return saving

    def finish_and_note() -> object:
        peaks.append(manager._engine._pool.peak_bytes)
        return finish_step()

    manager.forward_pass, manager.finish_step = observed_pass, finish_and_note
    with run.data:
        train_step(run, 1)
    records = {key: list(map(record_of, each)) for key, each in stored.items()}
    return Observed(records, peaks[0])


def planned(stage: StagePlan, key: PassKey, stored: Sequence[Record], *, offloads: bool) -> Counter:
    """What the plan lists for a pass with the documents and the routing that it had."""
    config, chunk = stage.config, stage.chunks[key.vp_stage]
    layers = chunk.layers
    rows = iter([shape[0] for name, shape, *_ in stored if name == "moe.up_input"])
    logarithms = [shape for name, shape, *_ in stored if name == "attention.output" and len(shape) == 3]
    lengths = tuple(shape[2] for shape in logarithms[: len(logarithms) // max(1, len(layers))])
    # Padding is in the place of a document, and goes to no expert: pairs of a token and an expert that are
    # sent are saved twice, before where each token's begin.
    tokens, model = config.train.seq_len, config.model
    shapes = [shape for name, shape, *_ in stored if name == "rest"]
    sent = [
        first[0]
        for first, second, third in zip(shapes, shapes[1:], shapes[2:], strict=False)
        if len(first) == 1 and first == second and third == (tokens,)
    ]
    num_sent = sent[0] // model.num_experts_per_token if sent else tokens
    sizes = replace(stage.balanced_sizes, documents=lengths or (tokens,), padding_tokens=tokens - num_sent)
    assert sizes.tokens == tokens
    lists = saved_tensors(config, sizes)
    tensors = lists.every_chunk(layers)
    if chunk.is_first:
        tensors += lists.first_chunk()
    if chunk.is_last:
        tensors += lists.last_chunk()
    for layer in layers:
        is_moe = layer >= config.model.num_dense_layers
        if is_moe:
            lists = saved_tensors(config, replace(sizes, expert_rows=next(rows)))
        tensors += lists.layer(is_moe=is_moe)
    return Counter(
        (each.tensor.name, each.tensor.shape, each.policy, each.device_bytes, each.host_bytes)
        for each in pack_all(config, tensors, offloads=offloads)
    )


@pytest.mark.parametrize("sizes", LAYOUTS)
def test_ranks_store_and_hold_what_is_planned(data: Path, tmp_path: Path, sizes: str) -> None:
    num_ranks, more = LAYOUTS[sizes]
    arguments = overrides(data, tmp_path, "train.global_batch_size=16", *OFFLOADING, *more)
    config = compose(arguments)
    pipeline = plan_pipeline(config)
    for rank, observed in enumerate(run_ranks(observe_a_step, num_ranks, arguments)):
        stage = pipeline.stages[rank // config.dp]
        passes = stage.passes
        stay = offload_order(passes, config.activation.passes_ahead).stay
        assert set(observed.stored) == {each.key for each in passes}
        for key, stored in observed.stored.items():
            expected = planned(stage, key, stored, offloads=key not in stay)
            found = Counter(stored)
            missing, further = expected - found, found - expected
            assert not missing, f"rank {rank}, {key}"
            # The places of vision features, in the first chunk.
            assert all(name == "rest" and len(shape) == 1 for name, shape, *_ in further), further
        held = {key: sum(map(blocks_of, stored)) for key, stored in observed.stored.items()}
        peak = peak_held(passes, held.__getitem__)
        if config.parallelism.overlap_expert_comm:
            # A backward pass frees while the concurrent forward pass saves.
            assert peak - max(held.values()) < observed.host_bytes <= peak
        else:
            assert observed.host_bytes == peak
        assert peak <= offload_budget(stage).host_bytes


def blocks_of(record: Record) -> int:
    """Host memory of a tensor; FP8 values and scales have a block each."""
    _, shape, policy, _, host_bytes = record
    if policy is Policy.fp8_offload:
        return block_bytes(math.prod(shape)) + block_bytes(host_bytes - math.prod(shape))
    return block_bytes(host_bytes) if host_bytes else 0


def test_the_largest_micro_batch_is_no_smaller_than_any(data: Path, tmp_path: Path) -> None:
    """All tokens at one rank's experts is what no routing exceeds."""
    _, more = LAYOUTS["pp2 vpp2 ep2 overlap"]
    config = compose(overrides(data, tmp_path, *OFFLOADING, *more))
    tokens, model = config.train.seq_len, config.model
    each = min(model.num_experts_per_token, model.num_experts // 2)
    assert largest_sizes(config).expert_rows == 2 * tokens * each
