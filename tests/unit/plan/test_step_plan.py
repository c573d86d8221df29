"""The time of a step: parts that add up, what changes it and in which direction, against the simulation."""

import subprocess
import sys
from collections.abc import Sequence
from dataclasses import replace
from functools import cache
from typing import Any

import pytest

from k25_train.compose.resolve import compose
from k25_train.config.schema import Config
from k25_train.metrics.planned_timeline import planned_trace
from k25_train.metrics.timeline import Kind, segments, step_s
from k25_train.plan.assumptions import AS_CONFIGURED, Assumptions, OtherCode, Sharding
from k25_train.plan.cause import Cause
from k25_train.plan.pipeline import plan_pipeline
from k25_train.plan.time.data_parallel import chunk_exchange
from k25_train.plan.time.encoder import coupled_pass_s
from k25_train.plan.time.plan_step import plan_step
from k25_train.plan.time.schedule import PassUse
from k25_train.plan.time.step_durations import StepDurations
from k25_train.plan.time.step_plan import StepPlan
from parallel.pipeline.simulator import simulate
from tests.helpers.trained import trained_vision

REAL = ("experiment=k25_pretrain_4k", "cluster.nodes=64")
FEW = (*REAL, "train.global_batch_size=1024")
"""32 micro-batches on each replica."""


@cache
def plan(*overrides: str, assumed: Assumptions = AS_CONFIGURED) -> StepPlan:
    return plan_step(plan_pipeline(compose(overrides), assumptions=assumed))


def seconds(step: StepPlan) -> dict[Cause, float]:
    return {part.cause: part.seconds for part in step.parts}


def with_rates(config: Config, **rates: Any) -> Config:
    cluster = replace(config.cluster, rates=replace(config.cluster.rates, **rates))
    return replace(config, cluster=cluster)


@pytest.mark.parametrize(
    "overrides",
    [
        REAL,
        (*REAL, "dep.schedule=bubbles"),
        (*REAL, "dep.mode=coupled"),
        (*REAL, *trained_vision("nothing")),
        ("experiment=moonlight_16b",),
        ("experiment=smoke",),
        ("experiment=smoke", "parallelism=serial", "cluster.gpus_per_node=1"),
    ],
)
def test_parts_add_up_to_the_step(overrides: Sequence[str]) -> None:
    step = plan(*overrides)
    assert step.step_s == sum(part.seconds for part in step.parts)
    assert all(part.seconds > 0 and part.how for part in step.parts)
    assert len({part.cause for part in step.parts}) == len(step.parts)
    assert 0 < step.mfu < 1
    # No resource is in use longer than the step takes.
    assert all(0 <= busy_s <= step.step_s for busy_s in step.busy_s.values())


@pytest.mark.parametrize("more", [(), ("parallelism.pp=8", "parallelism.ep=32")])
def test_passes_and_idle_time_are_what_the_whole_simulated_schedule_takes(more: tuple[str, ...]) -> None:
    step = plan(*REAL, *more)
    pipeline = step.pipeline
    full = simulate([stage.passes for stage in pipeline.stages], StepDurations(pipeline))
    around = (Cause.encoder, Cause.data_parallel, Cause.optimizer, Cause.between_steps, Cause.checkpoint)
    of_passes = {cause: each for cause, each in seconds(step).items() if cause not in around}
    assert sum(of_passes.values()) == pytest.approx(full.makespan_s, rel=1e-9)
    busy_s = full.makespan_s - min(
        sum(slot.seconds for slot in full.slots(stage.stage)) for stage in pipeline.stages
    )
    waits_s = of_passes.pop(Cause.bubble) + of_passes.pop(Cause.pipeline)
    assert waits_s == pytest.approx(full.makespan_s - sum(of_passes.values()), rel=1e-6)
    assert step.bubble_share * step.step_s < full.makespan_s - busy_s < waits_s + 1e-6


@pytest.mark.parametrize("more", [(), ("parallelism.dispatcher=alltoall", "dep.schedule=bubbles")])
def test_more_bandwidth_is_never_slower(more: tuple[str, ...]) -> None:
    config = plan(*FEW, *more).pipeline.config
    for key in ("network_gb_per_s", "host_copy_gb_per_s"):
        rates: list[dict[str, Any]] = [{key: rate} for rate in (5.0, 50.0, 400.0)]
        clusters = [replace(config.cluster, **each) for each in rates]
        steps = [plan_step(plan_pipeline(replace(config, cluster=cluster))).step_s for cluster in clusters]
        assert steps == sorted(steps, reverse=True), key
    links = [with_rates(config, nvlink_gb_per_s=rate) for rate in (5.0, 50.0, 400.0)]
    steps = [plan_step(plan_pipeline(each)).step_s for each in links]
    assert steps == sorted(steps, reverse=True)


def test_faster_devices_are_faster_and_more_nodes_shorten_a_step() -> None:
    config = compose(FEW)
    slow, fast = (
        plan_step(plan_pipeline(with_rates(config, bf16_tflops=tflops, memory_gb_per_s=memory)))
        for tflops, memory in ((500, 2000), (2250, 8000))
    )
    assert fast.step_s < slow.step_s
    steps = [plan("experiment=k25_pretrain_4k", f"cluster.nodes={nodes}").step_s for nodes in (32, 64, 256)]
    assert steps == sorted(steps, reverse=True)


def test_what_goes_wrong_makes_steps_longer() -> None:
    healthy = plan(*FEW).step_s
    for worse in (Assumptions(slow_node=1.5), Assumptions(vision_share=0.5)):
        assert plan(*FEW, assumed=worse).step_s > healthy
    # A slow node delays its stage, which all others wait for; it is not the whole cluster that is slow.
    slow = plan(*FEW, assumed=Assumptions(slow_node=1.5))
    assert 1.1 * healthy < slow.step_s < 1.5 * healthy
    # It is one of the stage that is the busiest without it.
    busiest = [{part.cause: part.how for part in each.parts}[Cause.compute] for each in (plan(*FEW), slow)]
    assert busiest[0] == busiest[1] and not busiest[0].startswith("stage 0")


@pytest.mark.parametrize("more", [(), ("dep.mode=coupled",)])
def test_a_slow_node_encodes_slowly(more: tuple[str, ...]) -> None:
    """All wait for its images ahead of the pipeline, and in it if its stage is the one that has the tower."""
    healthy, slow = (
        seconds(plan(*FEW, *more, assumed=Assumptions(slow_node=times)))[Cause.encoder]
        for times in (1.0, 1.5)
    )
    assert 1.3 * healthy < slow < 1.51 * healthy


def test_a_model_without_a_tower_has_no_images() -> None:
    for overrides in (("experiment=published", "model=qwen3_30b_a3b"), FEW):
        pipeline = plan_pipeline(compose(overrides), assumptions=Assumptions(vision_share=0.3))
        assert pipeline.assumptions.vision_share == 0.3 * pipeline.config.model.has_vision
        assert all(stage.assumptions is pipeline.assumptions for stage in pipeline.stages)


def test_images_cost_least_in_idle_time_and_most_in_the_first_stage() -> None:
    text = plan(*REAL, assumed=Assumptions(vision_share=0.0))
    steps = [plan(*REAL, *more).step_s for more in (("dep.schedule=bubbles",), (), ("dep.mode=coupled",))]
    assert text.step_s <= steps[0] < steps[1] < steps[2]
    assert Cause.encoder not in seconds(text)
    # The first stage becomes the busiest, and waits for images in each of its passes through the first chunk.
    coupled = plan(*REAL, "dep.mode=coupled")
    of_passes_s = coupled.pipeline.num_micro_batches * sum(coupled_pass_s(coupled.pipeline))
    assert seconds(coupled)[Cause.encoder] == pytest.approx(of_passes_s)
    # Forward a second time counts in time alone.
    upfront = plan(*REAL)
    assert upfront.model_flops > text.model_flops


def test_other_code_that_cuts_weights_sends_them_with_every_pass() -> None:
    layout = ("parallelism=serial", "parallelism.ep=8", "cluster.network_gb_per_s=5")
    ours = plan("experiment=moonlight_16b", *layout)
    sharded = plan(
        "experiment=moonlight_16b", *layout, assumed=Assumptions(code=OtherCode(sharding=Sharding.weights))
    )
    assert seconds(sharded)[Cause.data_parallel] > seconds(ours)[Cause.data_parallel]
    # On a fast network a pass waits for little more than its first layer's.
    fast = replace(
        sharded.pipeline.config, cluster=replace(sharded.pipeline.config.cluster, network_gb_per_s=400.0)
    )
    pipeline = plan_pipeline(fast, assumptions=sharded.pipeline.assumptions)
    gathered_s = chunk_exchange(pipeline, 0, 2).seconds
    waited_s = StepDurations(pipeline).of(PassUse(0, None)).parts[Cause.data_parallel]
    assert gathered_s / fast.model.num_layers <= waited_s < 0.5 * gathered_s


def test_constants_of_a_calibration_are_in_the_step() -> None:
    plain = plan(*FEW)
    before = plain.pipeline.config.cluster.rates.calibration
    calibration = replace(before, step_ms=250, kernels=1.2 * before.kernels)
    fitted = plan_step(plan_pipeline(with_rates(plain.pipeline.config, calibration=calibration)))
    assert seconds(fitted)[Cause.between_steps] == pytest.approx(seconds(plain)[Cause.between_steps] + 0.25)
    assert seconds(fitted)[Cause.compute] == pytest.approx(1.2 * seconds(plain)[Cause.compute])


def test_a_copy_for_a_checkpoint_is_spread_over_the_steps_between() -> None:
    config = plan(*FEW).pipeline.config

    def copied_s(interval: int | str) -> float:
        checkpoint = replace(config.checkpoint, interval=interval)
        return seconds(plan_step(plan_pipeline(replace(config, checkpoint=checkpoint))))[Cause.checkpoint]

    assert copied_s(10) == pytest.approx(4 * copied_s(40))
    assert 0 < copied_s("30min") < copied_s(40)


def test_data_that_are_not_read_ahead_are_waited_for() -> None:
    assert Cause.data not in seconds(plan(*FEW))
    by_workers = {
        cores: seconds(plan(*FEW, "data.prefetch_steps=0", f"data.workers={cores}"))[Cause.data]
        for cores in (2, 4)
    }
    assert by_workers[2] == pytest.approx(2 * by_workers[4])
    # 1,024 sequences of 4,096 tokens over 512 ranks, a tenth of them images of 640 tokens and 15 ms each.
    assert by_workers[4] == pytest.approx(0.1 * 8192 / 640 * 0.015 / 4)


PROGRAM = """
import sys, time
from k25_train.compose.resolve import compose
from k25_train.plan.memory.verdict import judge_memory
from k25_train.plan.pipeline import plan_pipeline
from k25_train.plan.time.encoder import coupled_pass_s
from k25_train.plan.time.plan_step import plan_step

pipeline = plan_pipeline(compose(["experiment=k25_pretrain_4k"]))
step, verdict = plan_step(pipeline), judge_memory(pipeline)
simulated = sum(map(len, step.timeline.schedules))
print(time.process_time(), simulated, any(name in sys.modules for name in ("torch", "matplotlib")))
"""


def test_the_real_job_is_planned_in_seconds_on_a_login_node() -> None:
    """65,536 passes in a step. The bound is generous: about a second of a quiet core is usual."""
    told = subprocess.run([sys.executable, "-c", PROGRAM], check=True, capture_output=True, text=True).stdout
    cpu_s, simulated, has_imported = told.split()
    assert float(cpu_s) < 6.0
    assert int(simulated) < 65536 / 4
    assert has_imported == "False"


@pytest.mark.parametrize("more", [(), ("dep.schedule=bubbles",)])
def test_the_planned_step_as_phases_of_ranks(more: tuple[str, ...]) -> None:
    step = plan(*FEW, *more)
    records = planned_trace(step)
    assert [record.stage for record in records] == list(range(16))
    kinds = {segment.kind for record in records for segment in segments(record.spans)}
    assert kinds >= {Kind.vision_forward, Kind.vision_backward, Kind.forward_and_backward, Kind.optimizer}
    for record in records:
        ends_s = [0.0]
        for segment in segments(record.spans):
            assert segment.start_s >= ends_s[-1] - 1e-9
            ends_s.append(segment.end_s)
    assert step_s(records) == pytest.approx(step.step_s - _left_out_s(step), rel=0.01)
    # In idle times the encoder has its share of them.
    parts, last = seconds(step), records[-1]
    encoded_s = sum(
        each.end_s - each.start_s
        for each in segments(last.spans)
        if each.kind in (Kind.vision_forward, Kind.vision_backward)
    )
    if more:
        idle_s = sum(slot.seconds for slot in step.timeline.slots(last.stage))
        share = parts[Cause.encoder] / (parts[Cause.encoder] + parts[Cause.bubble])
        assert encoded_s == pytest.approx(share * idle_s, rel=0.01)
    else:
        assert encoded_s == pytest.approx(parts[Cause.encoder])


def _left_out_s(step: StepPlan) -> float:
    """What the timeline has less than the step: micro-batches that were not simulated."""
    parts = seconds(step)
    outside = (Cause.optimizer, Cause.between_steps, Cause.checkpoint, Cause.data_parallel, Cause.data)
    passes_s = step.step_s - sum(parts.get(cause, 0.0) for cause in outside)
    if step.pipeline.config.dep.schedule.value == "upfront":
        passes_s -= parts[Cause.encoder]
    return passes_s - step.timeline.makespan_s
