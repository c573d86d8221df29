"""What ranks hold at their peaks, budgets of offloading, and the command that prints both."""

import json
import subprocess
import sys
from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from k25_train.compose.resolve import compose
from k25_train.config.schema import Config
from k25_train.plan.cause import Cause
from k25_train.plan.memory.activations import peak_held, stage_tensors
from k25_train.plan.memory.offload import need_of, offload_budget, offload_need
from k25_train.plan.memory.outside import PAIR_BYTES, communicators_in
from k25_train.plan.memory.stage import (
    chunk_memory,
    fullest,
    most_imbalance,
    room_bytes,
    stage_memories,
    with_imbalance,
)
from k25_train.plan.memory.verdict import Fit, judge_memory
from k25_train.plan.pipeline import passes_of_stage, plan_pipeline, sample_of_passes
from k25_train.plan.report.memory_lines import memory_lines
from k25_train.plan.time.plan_step import plan_step
from parallel.activations.order import offload_order
from parallel.activations.sizes import BLOCK_BYTES, block_bytes
from parallel.communicators import communicators_of
from parallel.pipeline.schedule import Pass, PassKey, schedule_of
from tests.helpers.parallel_sizes import parallel_sizes
from tests.helpers.project_sources import REPO

AS_REPORTED = ["experiment=k25_pretrain_4k", "activation=k2", "optim=muonclip"]


@pytest.fixture(scope="module")
def pretrain() -> Config:
    """The report's plan on 256 ranks, all states on the device: too much."""
    return compose(AS_REPORTED)


@pytest.fixture(scope="module")
def fitting() -> Config:
    """The same with less on the device."""
    return compose(["experiment=k25_pretrain_4k"])


@pytest.mark.parametrize("overlaps", [False, True])
@pytest.mark.parametrize("stage", range(4))
def test_passes_held_by_interleaved_ranks(stage: int, overlaps: bool) -> None:
    """Warm-up, and the forward pass that comes before, or runs concurrently with, the first backward pass."""
    passes = schedule_of(4, 2, 16, 4, stage, overlaps=overlaps)
    ahead = 2 * (4 - stage - 1) + 4 + overlaps
    assert peak_held(passes, lambda key: 1) == ahead + 1


def test_peak_counts_a_pass_that_runs_beside_the_backward_that_frees() -> None:
    passes = [Pass(True, 0, 0), Pass(True, 0, 1, True), Pass(False, 0, 0), Pass(False, 0, 1)]
    assert peak_held(passes, lambda key: 10 ** (key.micro_batch + 1)) == 110


@settings(max_examples=200)
@given(
    pp=st.integers(1, 8), vpp=st.integers(1, 4), rounds=st.floats(1, 14), overlaps=st.booleans(),
    num_ahead=st.integers(1, 5), weights=st.lists(st.integers(0, 100), min_size=8, max_size=8),
)  # fmt: skip
def test_few_passes_hold_what_all_hold(
    pp: int, vpp: int, rounds: float, overlaps: bool, num_ahead: int, weights: list[int]
) -> None:
    """The same peaks of passes that leave the device and of those that stay."""
    vpp = vpp if pp > 1 else 1
    sizes = parallel_sizes(pp=pp, vpp=vpp, overlap_expert_comm=overlaps and (vpp > 1 or pp == 1))
    number = max(2, int(pp * rounds))

    def peaks(passes: list[Pass]) -> tuple[int, int]:
        stay = offload_order(passes, num_ahead).stay
        return (
            peak_held(passes, lambda key: weights[key.vp_stage + 4 * (key in stay)]),
            peak_held(passes, lambda key: weights[key.vp_stage] * (key not in stay)),
        )

    for stage in range(pp):
        assert peaks(sample_of_passes(sizes, number, stage)) == peaks(passes_of_stage(sizes, number, stage))


def test_host_memory_is_what_a_walk_over_passes_needs(pretrain: Config) -> None:
    stage = plan_pipeline(pretrain).stages[3]
    passes = stage.passes
    stay = offload_order(passes, pretrain.activation.passes_ahead).stay
    chunks = stage_tensors(stage, stage.balanced_sizes)
    sizes = [sum(block_bytes(each.host_bytes) for each in chunk if each.host_bytes) for chunk in chunks]
    held: dict[PassKey, int] = {}
    most = 0
    for each in passes:
        key = each.key
        if each.is_forward and key not in stay:
            held[key] = sizes[key.vp_stage]
            most = max(most, sum(held.values()))
        elif not each.is_forward:
            held.pop(key, None)
    need = offload_need(stage)
    assert need.host_bytes == most
    budget = offload_budget(stage)
    assert budget.host_bytes == pytest.approx(1.5 * most, abs=BLOCK_BYTES)
    assert budget.device_bytes == 1.5 * 4 * sum(each.host_bytes for each in chunks[0])


def test_budgets_that_are_given_are_kept() -> None:
    config = compose(["experiment=k25_pretrain_4k", "activation.host_gib=40.5", "activation.device_gib=0.25"])
    budget = offload_budget(plan_pipeline(config).stages[1])
    assert (budget.host_bytes, budget.device_bytes) == (81 * 2**29, 2**28)


def test_shrunk_models_have_host_memory_for_any_routing() -> None:
    """Of a few hundred tokens, all may go to one rank."""
    config = compose(["experiment=smoke", "activation=k2", "activation.moe.up_input=offload"])
    stage = plan_pipeline(config).stages[1]
    worst = stage.largest_sizes
    assert worst.expert_rows == 2 * stage.balanced_sizes.expert_rows
    [rows] = {
        each.host_bytes for each in stage_tensors(stage, worst)[0] if each.tensor.name == "moe.up_input"
    }
    assert rows == worst.expert_rows * config.model.hidden_size * 4
    need = offload_need(stage)
    assert need == need_of(stage, worst)
    assert need.pass_bytes >= need_of(stage, stage.balanced_sizes).pass_bytes + rows // 2


def test_nothing_is_needed_where_every_pass_stays() -> None:
    alone = ["parallelism=serial", "cluster.gpus_per_node=1"]
    config = compose(["experiment=smoke", "activation=k2", *alone])
    need = offload_need(plan_pipeline(config).stages[0])
    assert need.host_bytes == need.pass_bytes == 0


def test_states_are_those_of_the_dry_run(pretrain: Config) -> None:
    """The dry run's README has its table of 256 ranks: GiB of weights, gradients and optimizer."""
    readme = (REPO / "k25_train/dryrun/README.md").read_text()
    memories = stage_memories(plan_pipeline(pretrain))
    for stage in (0, 1, 15):
        memory = memories[stage]
        parts = (memory.weights, memory.gradients, memory.optimizer)
        parts = (*parts, sum(parts))
        line = next(line for line in readme.splitlines() if line.startswith(f" {stage:<3}"))
        assert [f"{part / 2**30:.2f}" for part in parts] == line.removesuffix(" ◄").split()[-4:]


def test_tokens_of_both_passes_are_on_their_way_to_experts(fitting: Config) -> None:
    """Three tensors of rows forward and four backward, 470 MB each."""
    memories = stage_memories(plan_pipeline(fitting))
    assert {memory.exchanged for memory in memories} == {7 * 32768 * 7168 * 2}


def test_features_at_rest_are_on_first_stages(fitting: Config) -> None:
    """2 GiB of them, those of a micro-batch in flight and of one in use; nothing without a tower."""
    first, *others = stage_memories(plan_pipeline(fitting))
    assert first.features == 2 * 2**30 + 2 * 4096 * 7168 * 2
    assert not any(memory.features for memory in others)
    smaller = replace(fitting, dep=replace(fitting.dep, feature_buffer_gib=0.5))
    assert first.features - stage_memories(plan_pipeline(smaller))[0].features == 1.5 * 2**30
    coupled = compose(["experiment=k25_pretrain_4k", "dep.mode=coupled"])
    assert not any(each.features or each.encoding for each in stage_memories(plan_pipeline(coupled)))


def test_the_encoder_is_planned_upfront_and_in_bubbles(fitting: Config) -> None:
    """Upfront an image of 16,384 patches takes 18 GB, alone with the states; in bubbles what is left."""
    upfront = stage_memories(plan_pipeline(fitting))
    assert all(18e9 < memory.encoding < 23e9 and not memory.tower for memory in upfront)
    config = compose(["experiment=k25_pretrain_4k", "dep.schedule=bubbles"])
    pipeline = plan_pipeline(config)
    memories, memory = stage_memories(pipeline), chunk_memory(pipeline)
    assert all(not each.encoding and 2.3e9 < each.tower < 7e9 for each in memories)
    assert not memory.keeps(16384) and memory.keeps(500)
    assert room_bytes(config, fullest(memories)) > 0
    on_cpu = replace(
        config, cluster=replace(config.cluster, rates=replace(config.cluster.rates, memory_gb=None))
    )
    assert chunk_memory(plan_pipeline(on_cpu)).keeps(10**6)


def test_communicators_are_counted(fitting: Config) -> None:
    """All that ranks set up before the first step, and a pair with each neighbour."""
    found = communicators_in(fitting)
    set_up = {each.name for each in communicators_of(fitting.parallelism, fitting.dep, fitting.world_size)}
    assert set(found) - set_up == {"previous stage", "next stage"} and set_up < set(found)
    assert found["next stage"] == PAIR_BYTES
    # Exchanges within a node take the most for each channel.
    assert found["tokens"] == 8 * 103e6 > found["weights"]
    assert found["weights"] == 16 * 43e6
    memory = stage_memories(plan_pipeline(fitting))[1]
    # With the 32 channels that NCCL takes by itself.
    usual = memory.gaps + memory.context + memory.nccl + 24 * 103e6
    assert 9e9 < usual < 14e9, "as reported on H100"
    alone = compose(["experiment=smoke_1gpu"])
    assert not communicators_in(alone) and fullest(stage_memories(plan_pipeline(alone))).context
    assert not fullest(stage_memories(plan_pipeline(compose(["experiment=smoke"])))).gaps


@pytest.mark.parametrize(
    "overrides",
    [
        ["activation=k2"],
        ["activation=k2_fp8_offload"],
        ["activation=k2", "dep.schedule=bubbles"],
    ],
    ids=" ".join,
)
def test_what_does_not_fit_is_told_what_makes_it_fit(overrides: list[str]) -> None:
    """By overrides that are tried here."""
    every = ["experiment=k25_pretrain_4k", *overrides]
    verdict = judge_memory(plan_pipeline(compose(every)))
    assert (
        (verdict.remedy is None) == (verdict.fit is Fit.fits) == (overrides == ["activation=k2_fp8_offload"])
    )
    if verdict.remedy is None:
        return
    chosen = compose([*every, *verdict.remedy.overrides])
    left = judge_memory(plan_pipeline(chosen)).margin_bytes
    assert left == pytest.approx(verdict.remedy.left_bytes) and verdict.remedy.fits and left > 1e9


def test_imbalance_is_where_room_ends(fitting: Config) -> None:
    pipeline = plan_pipeline(fitting)
    worst = fullest(stage_memories(pipeline))
    stage = pipeline.stages[worst.stage]
    assert room_bytes(fitting, worst) == 84.9e9 - worst.device > 0
    assert worst.device == worst.tensors + worst.gaps + worst.context + worst.nccl
    factor = most_imbalance(stage, worst)
    assert 1 < factor < fitting.parallelism.ep
    assert room_bytes(fitting, with_imbalance(stage, worst, factor)) >= 0
    assert room_bytes(fitting, with_imbalance(stage, worst, factor * 1.01)) < 0
    roomy = replace(
        fitting, cluster=replace(fitting.cluster, rates=replace(fitting.cluster.rates, memory_gb=1e6))
    )
    assert most_imbalance(plan_pipeline(roomy).stages[worst.stage], worst) == 16


def most_saved(*arguments: str) -> int:
    """Bytes of activations that wait on the fullest stage's device."""
    return max(memory.saved for memory in stage_memories(plan_pipeline(compose(arguments))))


def test_more_is_saved_the_less_is_done_about_it() -> None:
    """Of the fullest stage: kept, recomputed as K2 does, then also in FP8, then also offloaded."""
    keep = ["experiment=k25_pretrain_4k", "activation=keep"]
    recompute = [
        f"activation.{name}=recompute"
        for name in "norm.output mla.up_input mla.up_proj attention.joined moe.down_input".split()
    ]
    fp8 = ["activation.moe.up_input=fp8", "activation.moe.swiglu_input=fp8"]
    saved = [most_saved(*keep, *more) for more in ([], recompute, [*recompute, *fp8])]
    saved.append(most_saved("experiment=k25_pretrain_4k"))
    assert saved == sorted(saved, reverse=True)
    assert saved[0] > 4 * saved[-1]


def run_command(*arguments: str) -> str:
    """What the command prints on a machine without torch."""
    code = (
        "import sys; sys.modules['torch'] = sys.modules['megatron'] = None; "
        f"sys.argv[1:] = {list(arguments)}; from k25_train.plan.__main__ import main; main()"
    )
    done = subprocess.run(
        [sys.executable, "-c", code],
        cwd=REPO, env={"COLUMNS": "160"}, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_command_prints_whether_the_plan_fits() -> None:
    text = run_command("experiment=k25_pretrain_4k", "--activations")
    assert "FITS: stage 0 is the fullest. Of 84.9 GB, 34.55 GB of states" in text
    assert "tokens on their way to experts and back" in text and "margin to 84.9 GB" in text
    assert "moe.up_input                 32768 x 7168           fp8+offload" in text
    assert "242,221,056" in text, "32,768 rows of 7,168 bytes and 56 scales"


@pytest.mark.parametrize(("gb_per_s", "is_hidden"), [(20, True), (10, False)])
def test_summary_says_whether_copies_are_hidden(gb_per_s: float, is_hidden: bool) -> None:
    config = compose(["experiment=k25_pretrain_4k", f"cluster.host_copy_gb_per_s={gb_per_s}"])
    pipeline = plan_pipeline(config)
    text = "".join(memory_lines(pipeline, judge_memory(pipeline)))
    assert "Copies: stage 1 sends 1.89 GB of a micro-batch to the host and back" in text
    assert ("it waits for copies" not in text) == is_hidden


def test_command_prints_what_would_help() -> None:
    text = run_command(*AS_REPORTED, "cluster.rates.memory_gb=40", "--activations")
    assert "DOES NOT FIT: stage 1 has 65.88 GB of states" in text
    assert "what helps most: optim.offload=cpu activation=k2_fp8_offload activation." in text


def test_command_prints_json_of_the_same(pretrain: Config) -> None:
    plan = json.loads(run_command(*AS_REPORTED, "--activations", "--json"))
    assert plan["tokens"] == 4096
    assert set(plan["parts"]) == {"dense layer", "MoE layer", "once per chunk", "first chunk", "last chunk"}
    memories = stage_memories(plan_pipeline(pretrain))
    assert [stage["saved"] for stage in plan["stages"]] == [memory.saved for memory in memories]
    assert plan["stages"][0]["layers"] == [[0, 1], [31, 32]]


def test_a_machine_without_gpus_has_no_verdict() -> None:
    text = run_command("experiment=smoke", "activation=k2", "--activations")
    assert "FIT" not in text
    assert "Host memory for activations" in text


def test_stages_may_be_without_layers() -> None:
    """The first has token ids alone, the last its norm and the loss."""
    sizes = ["parallelism=serial", "parallelism.pp=4", "parallelism.layout='E|ttt|tt|L'", "train.seq_len=128"]
    config = compose(["experiment=smoke", "activation=k2", *sizes])
    first, *_, last = stage_memories(plan_pipeline(config))
    assert first.copied == first.exchanged == 0
    assert last.working == 256 * 4096 * (4 + 4) + 4 * 256 * 4096 * 4
    assert first.working == 256 * config.model.hidden_size * 4
    assert first.saved == first.num_held * 256 * 8


def test_experts_that_are_rounded_are_on_the_device_twice(fitting: Config) -> None:
    """24 of 384 experts with three matrices each, in bfloat16, in every MoE layer of a rank; and the seconds
    in which they are read and written."""
    rounded = compose(["experiment=k25_pretrain_4k", "model.quantization=int4_qat"])
    model = rounded.model
    of_layer = (
        2 * model.num_experts // rounded.parallelism.ep * 3 * model.hidden_size * model.expert_ffn_hidden_size
    )
    pairs = zip(stage_memories(plan_pipeline(rounded)), stage_memories(plan_pipeline(fitting)), strict=True)
    for memory, before in pairs:
        layers = sum(model.is_moe(layer) for chunk in memory.layers for layer in chunk)
        assert memory.quantized == layers * of_layer and before.quantized == 0
        assert memory.states - before.states == memory.quantized
        assert memory.weights == before.weights
    seconds = {part.cause: part.seconds for part in plan_step(plan_pipeline(rounded)).parts}
    assert 0.05 < seconds[Cause.quantization] < 0.3
    assert Cause.quantization not in {part.cause for part in plan_step(plan_pipeline(fitting)).parts}
