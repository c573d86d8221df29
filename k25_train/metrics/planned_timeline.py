"""The passes of a planned step as a file for Perfetto, with the names that a traced step has."""

from pathlib import Path

from k25_train.metrics.chrome_trace import write_chrome_trace
from k25_train.metrics.timeline import RankRecord
from k25_train.plan.time.step_plan import StepPlan
from parallel.pipeline.timeline import Timeline
from parallel.watchdog.recorder import Span


def write_planned_trace(step: StepPlan, path: Path) -> None:
    """Write a JSON file with one track for each stage of the first replica.

    A long step is simulated for some of its micro-batches; what is around the passes is not in it.
    """
    config, timeline = step.pipeline.config, step.timeline
    drawn = sum(each.is_forward and each.vp_stage == 0 for each in timeline.schedules[0])
    title = f"planned step of {config.model.name}: {drawn} of {step.pipeline.num_micro_batches} micro-batches"
    write_chrome_trace(planned_records(timeline, config.dp), path, title)


def planned_records(timeline: Timeline, dp: int) -> list[RankRecord]:
    """What the first rank of each stage does, in seconds from the first pass.

    Args:
        timeline: of one replica, or of several of which the first is taken.
        dp: ranks of a stage in the job.
    """
    return [
        RankRecord(rank=stage * dp, stage=stage, replica=0, node="", ready_s=0.0, spans=tuple(spans))
        for stage, spans in enumerate(_spans(timeline))
    ]


def _spans(timeline: Timeline) -> list[list[Span]]:
    """[stage] -> its passes; two that overlap are one, as in a traced step."""
    found = []
    for stage, passes in enumerate(timeline.schedules):
        rank = stage * timeline.num_replicas
        spans = []
        for position, each in enumerate(passes):
            if position and passes[position - 1].overlaps_next:
                continue
            name = "forward" if each.is_forward else "backward"
            name = "forward and backward" if each.overlaps_next else name
            start_s, end_s = timeline.starts_s[rank][position], timeline.ends_s[rank][position]
            spans.append(Span(name, start_s, end_s, 0, ""))
        found.append(spans)
    return found
