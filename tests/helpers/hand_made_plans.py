"""Plans with numbers that are written down, for reports that have to show them."""

from dataclasses import fields, replace

from k25_train.compose.resolve import compose
from k25_train.plan.cause import Cause
from k25_train.plan.memory.stage import stage_memories
from k25_train.plan.memory.stage_memory import StageMemory
from k25_train.plan.memory.verdict import Fit, MemoryVerdict, Remedy
from k25_train.plan.pipeline import PipelinePlan, plan_pipeline
from k25_train.plan.report.planned import Planned
from k25_train.plan.time.step_plan import Part, StepPlan
from k25_train.units import GB
from parallel.pipeline.schedule import schedule_of
from parallel.pipeline.simulator import simulate
from parallel.pipeline.timeline import ChunkSeconds, Timeline

SECONDS = {
    Cause.compute: 38.0,
    Cause.recompute: 4.0,
    Cause.memory_bound: 3.0,
    Cause.storage: 1.5,
    Cause.host: 0.25,
    Cause.experts: 2.0,
    Cause.pipeline: 0.5,
    Cause.data_parallel: 0.75,
    Cause.bubble: 3.0,
    Cause.encoder: 5.0,
    Cause.optimizer: 1.75,
    Cause.between_steps: 0.25,
}
"""Cause -> seconds of the hand-made step; 60 together."""
GIGABYTES = {
    "weights": 11.5,
    "gradients": 23.0,
    "saved": 15.0,
    "outputs": 0.2,
    "buffer": 5.5,
    "working": 4.0,
    "exchanged": 3.25,
    "features": 2.25,
    "context": 0.5,
    "nccl": 5.0,
    "host": 65.0,
    "snapshot": 42.5,
}
"""Field of `StageMemory` -> GB of it on the first stage; 72 on the device, with gaps."""


def hand_made_step(pipeline: PipelinePlan) -> StepPlan:
    """A step of 60 seconds."""
    return StepPlan(
        pipeline=pipeline,
        parts=tuple(Part(cause, seconds, "written down") for cause, seconds in SECONDS.items()),
        timeline=hand_made_timeline(pipeline),
        model_flops=5.9e18,
        busy_s={"compute": 50.0, "nvlink": 12.0, "network": 20.0},
    )


def hand_made_timeline(pipeline: PipelinePlan) -> Timeline:
    """A few micro-batches, each pass of a second or two."""
    pp, vpp = pipeline.layout.pp, pipeline.layout.vpp
    schedules = [schedule_of(pp, vpp, 2 * pp, pp, stage) for stage in range(pp)]
    return simulate(schedules, ChunkSeconds(forward_s=(1.0,) * pp * vpp, backward_s=(2.0,) * pp * vpp))


def hand_made_verdict(
    fit: Fit = Fit.fits,
    *,
    device_gb: float = 72.0,
    limit_gb: float | None = 84.9,
    node_gb: float = 1000.0,
    remedy: Remedy | None = None,
) -> MemoryVerdict:
    """A verdict with these numbers."""
    return MemoryVerdict(
        fit=fit,
        stage=0,
        allocated_bytes=0.9 * device_gb * GB,
        device_bytes=device_gb * GB,
        limit_bytes=None if limit_gb is None else limit_gb * GB,
        load_bytes=40 * GB,
        node_bytes=node_gb * GB,
        node_limit_bytes=2147 * GB,
        remedy=remedy,
    )


def hand_made_remedy(*overrides: str, left_gb: float = 7.2, fit: Fit = Fit.fits) -> Remedy:
    """Overrides that leave so much, in a step that costs 3% more."""
    return Remedy(overrides=list(overrides), fit=fit, left_bytes=left_gb * GB, times_cost=1.03)


def hand_made_memory(memory: StageMemory) -> StageMemory:
    """The same stage with `GIGABYTES`, later stages with less saved, and nothing else."""
    nothing = {each.name: 0 for each in fields(memory) if each.type in ("int", int) and each.name != "stage"}
    held = {name: round(gb * GB) for name, gb in GIGABYTES.items()}
    held["saved"] -= round(0.5 * memory.stage * GB)
    return replace(memory, **{**nothing, **held, "num_held": 48 - memory.stage})


def hand_made_plan(*overrides: str, verdict: MemoryVerdict | None = None) -> Planned:
    """The plan of a configuration, with a step of 60 seconds and `GIGABYTES` on the first stage."""
    pipeline = plan_pipeline(compose(overrides))
    memories = tuple(map(hand_made_memory, stage_memories(pipeline)))
    return Planned(
        step=hand_made_step(pipeline), verdict=replace(verdict or hand_made_verdict(), memories=memories)
    )


def with_verdict(planned: Planned, verdict: MemoryVerdict) -> Planned:
    """The same plan with another verdict on its memory."""
    return replace(planned, verdict=replace(verdict, memories=planned.memories))
