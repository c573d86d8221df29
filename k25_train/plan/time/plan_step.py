"""How long a step takes: its passes, and what comes before, between and after them; torch-free.

What passes take is told as seen by a rank of the stage that computes the longest, for which the step waits;
what it waits for itself is idle time.

    step_durations   how long passes take on each stage          ─► schedule        when they run
    data_parallel    gradients and weights over replicas, as far as passes do not hide them
    encoder          images, before and after the passes or in their idle time
    optimizer        update of the weights
    between_steps    host work, data, checkpoints
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass

from k25_train.config.cluster import Device
from k25_train.config.schema import Config
from k25_train.plan.cause import Cause
from k25_train.plan.flops import training_flops
from k25_train.plan.pipeline import PipelinePlan, plan_pipeline
from k25_train.plan.time.between_steps import checkpoint_part, data_part, host_part
from k25_train.plan.time.data_parallel import DataParallelTimes, data_parallel_times
from k25_train.plan.time.encoder import EncoderPlan, encoder_plan, step_sizes
from k25_train.plan.time.optimizer import optimizer_part
from k25_train.plan.time.quantization import quantization_part
from k25_train.plan.time.schedule import StepSchedule, step_schedule
from k25_train.plan.time.step_durations import StepDurations, free_network_s
from k25_train.plan.time.step_plan import Part, StepPlan


def plan_step(pipeline: PipelinePlan) -> StepPlan:
    """The time of a step."""
    passes = _passes(pipeline)
    encoder = encoder_plan(pipeline, passes.mean_idle_s)
    replicas = data_parallel_times(pipeline, passes.schedule, passes.free_shares)
    parts = list(_parts(pipeline, passes, encoder, replicas))
    for waits in (data_part, checkpoint_part):
        parts.append(waits(pipeline, sum(part.seconds for part in parts)))
    sizes, config = step_sizes(pipeline), pipeline.config
    return StepPlan(
        pipeline=pipeline,
        parts=tuple(part for part in parts if part.seconds),
        timeline=passes.schedule.timeline,
        model_flops=training_flops(
            config.model,
            sizes,
            config.optim.trained,
            mtp_layers=pipeline.assumptions.code.mtp_layers,
        ),
        busy_s=_busy_s(passes, replicas),
    )


def expected_step_s(config: Config) -> float | None:
    """Seconds of a step by the plan; None for CPUs that were not calibrated: their rates are unknown."""
    cluster = config.cluster
    if cluster.device is Device.cpu and cluster.rates.calibration.is_neutral:
        return None
    return plan_step(plan_pipeline(config)).step_s


@dataclass(frozen=True, kw_only=True)
class _Passes:
    """The passes of a step."""

    durations: StepDurations
    """How long they take."""
    schedule: StepSchedule
    """When they run."""
    unhindered_s: float
    """What all passes would take without these messages."""
    busy_s: tuple[float, ...]
    """[stage] -> seconds in which it runs passes."""

    @property
    def stage(self) -> int:
        """The one that computes the longest."""
        return self.busy_s.index(max(self.busy_s))

    @property
    def mean_idle_s(self) -> float:
        """How long ranks are idle, on average over stages."""
        return self.schedule.makespan_s - sum(self.busy_s) / len(self.busy_s)

    @property
    def free_shares(self) -> list[float]:
        """[stage] -> share of its passes' time in which network and NVLink are free."""
        found = []
        for stage, busy_s in enumerate(self.busy_s):
            uses = self.schedule.uses[stage].items()
            plain = ((number, self.durations.of(use)) for use, number in uses)
            free_s = sum(number * free_network_s(each.seconds, each.busy_s) for number, each in plain)
            found.append(max(free_s / busy_s, LEAST_SHARE) if busy_s else 1.0)
        return found

    def totals(self) -> dict[Cause, float]:
        """Where the time of the busiest stage's passes goes."""
        found: dict[Cause, float] = {}
        for use, number in self.schedule.uses[self.stage].items():
            for cause, seconds in self.durations.of(use).parts.items():
                found[cause] = found.get(cause, 0.0) + number * seconds
        return found


LEAST_SHARE = 0.05
"""Share of a link that an exchange gets at least, however busy passes keep it. Source: our choice."""


def _passes(pipeline: PipelinePlan) -> _Passes:
    """When passes run, with a slow node where it delays them the most."""
    found = _simulated(pipeline, StepDurations(pipeline))
    if pipeline.assumptions.slow_node == 1.0:
        return found
    return _simulated(pipeline, StepDurations(pipeline, found.stage))


def _simulated(pipeline: PipelinePlan, durations: StepDurations) -> _Passes:
    sizes, number = pipeline.config.parallelism, pipeline.num_micro_batches
    schedule = step_schedule(sizes, number, durations)
    unhindered_s = schedule.makespan_s
    if any(durations.message_s(*use) for uses in schedule.uses for use in uses):
        unhindered_s = step_schedule(sizes, number, _Unhindered(durations)).makespan_s
    return _Passes(
        durations=durations,
        schedule=schedule,
        unhindered_s=unhindered_s,
        busy_s=tuple(schedule.busy_s(stage, durations) for stage in range(sizes.pp)),
    )


@dataclass(frozen=True, slots=True)
class _Unhindered:
    """`Durations` of passes whose messages take no time behind them."""

    durations: StepDurations

    @property
    def num_chunks(self) -> int:
        return self.durations.num_chunks

    def alone_s(self, chunk: int, *, is_forward: bool) -> float:
        return self.durations.alone_s(chunk, is_forward=is_forward)

    def pair_s(self, forward_chunk: int, backward_chunk: int) -> float:
        return self.durations.pair_s(forward_chunk, backward_chunk)

    def message_s(self, forward_chunk: int | None, backward_chunk: int | None) -> float:
        return 0.0


HOW = {
    Cause.compute: "kernels of its passes, by shape",
    Cause.recompute: "what passes compute again",
    Cause.memory_bound: "by bytes",
    Cause.storage: "by bytes",
    Cause.host: "launches that no kernel hides",
    Cause.experts: "what computation does not hide",
    Cause.context: "latents that are waited for",
    Cause.offload: "copies that computation does not hide",
}


def _parts(
    pipeline: PipelinePlan, passes: _Passes, encoder: EncoderPlan, replicas: DataParallelTimes
) -> Iterator[Part]:
    """All parts but those that depend on the step's own length."""
    # 1. Passes of the busiest stage.
    totals, schedule = passes.totals(), passes.schedule
    for cause, how in HOW.items():
        yield Part(cause, totals.get(cause, 0.0), f"stage {passes.stage}: {how}")
    # 2. What it waits for meanwhile; the encoder fills some of it.
    busy_s = passes.busy_s[passes.stage]
    hindered_s = max(0.0, schedule.makespan_s - passes.unhindered_s)
    idle_s = max(0.0, schedule.makespan_s - busy_s - hindered_s)
    filled_s = idle_s * min(1.0, encoder.in_idle_s / passes.mean_idle_s) if encoder.in_idle_s else 0.0
    how = f"within passes {totals.get(Cause.pipeline, 0.0):.2f} s, behind them {hindered_s:.2f}"
    yield Part(Cause.pipeline, totals.get(Cause.pipeline, 0.0) + hindered_s, how)
    number = pipeline.num_micro_batches
    how = f"simulated schedule of {number:,} micro-batches, less stage {passes.stage}'s passes"
    yield Part(Cause.bubble, idle_s - filled_s, how)
    # 3. Around them.
    coupled_s = totals.get(Cause.encoder, 0.0)
    how = "in the first stage's passes" if coupled_s else encoder.how
    yield Part(Cause.encoder, coupled_s + filled_s + encoder.around_s, how)
    waited_s = totals.get(Cause.data_parallel, 0.0) + encoder.weights_s
    waited_s += replicas.gathered_s + replicas.reduced_s
    how = f"gradients {replicas.reduced_s:.2f} s behind the last pass, "
    how += f"weights {replicas.gathered_s:.2f} before the first"
    yield Part(Cause.data_parallel, waited_s, how)
    yield optimizer_part(pipeline)
    yield quantization_part(pipeline)
    yield host_part(pipeline)


def _busy_s(passes: _Passes, replicas: DataParallelTimes) -> Mapping[str, float]:
    """Resource -> seconds in which it is in use on the busiest stage."""
    found: dict[str, float] = {}
    for use, number in passes.schedule.uses[passes.stage].items():
        for resource, seconds in passes.durations.of(use).busy_s.items():
            found[resource] = found.get(resource, 0.0) + number * seconds
    for resource, seconds in (("network", replicas.network_s), ("nvlink", replicas.nvlink_s)):
        found[resource] = found.get(resource, 0.0) + seconds
    return found
