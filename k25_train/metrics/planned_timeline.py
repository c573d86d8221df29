"""One planned step as phases of ranks, in the form in which training records them, and as a file.

A rank stands for each stage. As many micro-batches are there as were simulated; the others repeat them.
Phases have the names that training gives them. Which idle time the encoder takes is schematic: every one
in equal parts.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from k25_train.metrics.chrome_trace import write_chrome_trace
from k25_train.metrics.timeline import RankRecord, segments
from k25_train.plan.assumptions import Sharding
from k25_train.plan.cause import Cause
from k25_train.plan.time.step_plan import StepPlan
from parallel.config import DepSchedule
from parallel.pipeline.schedule import RECOMPUTE_AND_BACKWARD_COST
from parallel.watchdog.recorder import Span


def write_planned_trace(step: StepPlan, path: Path) -> None:
    """Write a JSON file with one track for each stage of the first replica."""
    drawn, number = step.timeline.num_micro_batches, step.pipeline.num_micro_batches
    title = f"planned step of {step.pipeline.config.model.name}: {drawn:,} of {number:,} micro-batches"
    write_chrome_trace(planned_trace(step), path, title)


def planned_trace(step: StepPlan) -> list[RankRecord]:
    """A record for the first rank of each stage, in seconds from the start of the step."""
    around = _around(step)
    return [
        RankRecord(
            rank=stage.stage * step.pipeline.config.dp_cp,
            stage=stage.stage,
            replica=0,
            node="",
            ready_s=0.0,
            spans=tuple(_spans(step, stage.stage, around)),
        )
        for stage in step.pipeline.stages
    ]


def planned_rows(step: StepPlan) -> list[list[tuple[str, float, float]]]:
    """[stage] -> (what it does, from, to) in seconds, without overlap."""
    return [
        [(each.kind.value, each.start_s, each.end_s) for each in segments(record.spans)]
        for record in planned_trace(step)
    ]


@dataclass(frozen=True, slots=True, kw_only=True)
class _Around:
    """What all ranks do outside their passes."""

    before: tuple[tuple[str, float], ...]
    """(phase, seconds) in order, until the first pass of the pipeline can start."""
    after: tuple[tuple[str, float], ...]
    """The same from the end of the pipeline's last pass on."""
    filled_share: float
    """Share of idle times that the encoder takes."""


def _around(step: StepPlan) -> _Around:
    config, seconds = step.pipeline.config, {part.cause: part.seconds for part in step.parts}
    encoder_s, bubble_s = seconds.get(Cause.encoder, 0.0), seconds.get(Cause.bubble, 0.0)
    forward_share, filled_share = _forward_share(step), 0.0
    if not config.vision_placement.encoder_parts:
        encoder_s = 0.0
    elif config.dep.schedule is DepSchedule.bubbles and encoder_s:
        filled_share, encoder_s = encoder_s / (encoder_s + bubble_s), 0.0
    # Weights that are cut are gathered and reduced within passes.
    is_whole = step.pipeline.assumptions.code.sharding is Sharding.optimizer
    reduced_s = seconds.get(Cause.data_parallel, 0.0) if is_whole else 0.0
    return _Around(
        before=(
            ("read data", seconds.get(Cause.data, 0.0)),
            ("vision forward", forward_share * encoder_s),
        ),
        after=(
            ("reduce gradients", reduced_s),
            ("vision backward", (1 - forward_share) * encoder_s),
            ("optimizer", seconds.get(Cause.optimizer, 0.0)),
            ("report", seconds.get(Cause.between_steps, 0.0)),
            ("checkpoint", seconds.get(Cause.checkpoint, 0.0)),
        ),
        filled_share=filled_share,
    )


def _spans(step: StepPlan, stage: int, around: _Around) -> Iterator[Span]:
    """Phases of a rank of a stage."""
    # 1. Before the pipeline, then its passes; overlapped ones are one phase.
    now_s, timeline = 0.0, step.timeline
    for name, seconds in around.before:
        if seconds:
            yield Span(name, now_s, now_s + seconds, 0, "")
        now_s += seconds
    passes = timeline.schedules[stage]
    for position, each in enumerate(passes):
        if position and passes[position - 1].overlaps_next:
            continue
        name = "forward" if each.is_forward else "backward"
        name = "forward and backward" if each.overlaps_next else name
        start_s, end_s = timeline.starts_s[stage][position], timeline.ends_s[stage][position]
        yield Span(name, now_s + start_s, now_s + end_s, 0, "")
    # 2. The encoder in idle times: forward ahead of its micro-batches, backward behind them.
    forward_until_s = _forward_share(step) * timeline.makespan_s
    for slot in timeline.slots(stage):
        name = "vision forward" if slot.start_s < forward_until_s else "vision backward"
        if around.filled_share:
            start_s = now_s + slot.start_s
            yield Span(name, start_s, start_s + around.filled_share * slot.seconds, 0, "")
    # 3. Behind the last pass of all stages.
    now_s += timeline.makespan_s
    for name, seconds in around.after:
        if seconds:
            yield Span(name, now_s, now_s + seconds, 0, "")
        now_s += seconds


def _forward_share(step: StepPlan) -> float:
    """Share of the encoder's time that its forward pass takes."""
    is_trained = bool(step.pipeline.config.vision_placement.trained_encoder_parts)
    return 1 / (1 + RECOMPUTE_AND_BACKWARD_COST) if is_trained else 1.0
