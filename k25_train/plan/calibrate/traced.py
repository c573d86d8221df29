"""How long the passes of a traced step took, by chunk and direction, from `trace/step_<N>.json`.

The trace has spans of the host, which on a GPU submits work and goes on, so only traces of the CPU are read.
Passes that overlap another are left out.
"""

import json
from collections import defaultdict
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any

from k25_train.config.cluster import Device
from k25_train.config.schema import Config
from k25_train.errors import K25Error
from k25_train.plan.pipeline import passes_of_stage

BOTH = "forward and backward"
NAMES = ("forward", "backward", BOTH)
"""Phases of passes, as the watchdog's tracker has them."""


class TraceError(K25Error):
    """A trace that is not of the run's passes."""


@dataclass(frozen=True, slots=True)
class TracedPass:
    """Passes of one chunk in one direction."""

    chunk: int
    """Position of the chunk in the pipeline, counted from 0."""
    is_forward: bool
    """Direction."""
    seconds: float
    """Their median duration over micro-batches and replicas."""
    num_passes: int
    """How many there are."""


def traced_passes(folder: Path, config: Config) -> tuple[TracedPass, ...]:
    """The passes of the step that `train.trace_step` names, in order of the chunks; none without a trace.

    Raises `TraceError` if the file is damaged, or has other passes than the layout.
    """
    path = folder / "trace" / f"step_{config.train.trace_step}.json"
    if config.cluster.device is not Device.cpu or not path.exists():
        return ()
    pp = config.parallelism.pp
    schedules = [passes_of_stage(config.parallelism, config.num_micro_batches, stage) for stage in range(pp)]
    seconds: dict[tuple[int, bool], list[float]] = defaultdict(list)
    for rank, events in spans_by_rank(path).items():
        stage = rank // config.dp_cp
        passes = schedules[stage] if stage < pp else []
        calls = [each for position, each in enumerate(passes) if not _follows(passes, position)]
        names = [BOTH if each.overlaps_next else NAMES[not each.is_forward] for each in calls]
        if names != [name for name, _ in events]:
            raise TraceError(
                f"{path}: rank {rank} ran {len(events)} passes in an order that is not the layout's, which "
                f"has {len(names)}: the trace is of another layout or damaged; calibrate with --no-trace"
            )
        for each, (_, duration_s) in zip(calls, events, strict=True):
            if not each.overlaps_next:
                seconds[each.vp_stage * pp + stage, each.is_forward].append(duration_s)
    return tuple(
        TracedPass(chunk, is_forward, median(found), len(found))
        for (chunk, is_forward), found in sorted(seconds.items())
        if median(found) > 0
    )


def spans_by_rank(path: Path) -> dict[int, list[tuple[str, float]]]:
    """Rank -> name and seconds of each of its passes, in the order of their starts.

    Raises `TraceError` if the file is not as `metrics/chrome_trace.py` writes it.
    """
    try:
        events = json.loads(path.read_text(encoding="utf-8"))["traceEvents"]
        spans = [_span(event) for event in events if event["ph"] == "X" and event["name"] in NAMES]
    except (OSError, ValueError, KeyError, TypeError, RecursionError) as error:
        raise TraceError(
            f"{path}: is not the timeline of a step ({type(error).__name__}); calibrate with --no-trace"
        ) from error
    found: dict[int, list[tuple[str, float]]] = defaultdict(list)
    for rank, _, name, duration_s in sorted(spans):
        found[rank].append((name, duration_s))
    return dict(found)


def _span(event: dict[str, Any]) -> tuple[int, float, str, float]:
    return int(event["tid"]), float(event["ts"]), str(event["name"]), float(event["dur"]) / 1e6


def _follows(passes: list[Any], position: int) -> bool:
    """Whether a pass runs in the call of the one before."""
    return position > 0 and passes[position - 1].overlaps_next
