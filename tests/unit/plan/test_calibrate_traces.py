"""Durations of passes from a trace: they separate what kernels take from what every pass takes."""

import json
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from k25_train.compose.resolve import load
from k25_train.config.schema import Config
from k25_train.metrics.chrome_trace import write_chrome_trace
from k25_train.metrics.timeline import RankRecord
from k25_train.plan.calibrate.calibrate import NAMES, calibrated
from k25_train.plan.calibrate.measured import read_run
from k25_train.plan.calibrate.planned import with_calibration
from k25_train.plan.calibrate.traced import BOTH, TraceError
from k25_train.plan.calibrate.traced import NAMES as PASSES
from k25_train.plan.pipeline import plan_pipeline
from k25_train.plan.time.plan_step import plan_step
from parallel.pipeline.schedule import Pass
from parallel.watchdog.recorder import Span
from tests.helpers.measured_runs import TRUTH, layout_config, write_run

SIZES = {"pp": 2, "vpp": 2, "ep": 2, "dp": 2}
OVERLAPS = ("parallelism.overlap_expert_comm=true", "parallelism.delay_wgrad=true")


def write_planned_trace(folder: Path, config: Config) -> Path:
    """The trace of a step whose passes run when the planner says; returns its path."""
    timeline = plan_step(plan_pipeline(with_calibration(config, TRUTH))).timeline
    records = []
    for rank in range(config.world_size):
        stage, replica = divmod(rank, config.dp)
        spans, passes = [Span("train", 0.0, timeline.makespan_s, 0, "")], timeline.schedules[stage]
        for position, each in enumerate(passes):
            name = BOTH if each.overlaps_next else PASSES[not each.is_forward]
            start_s, end_s = timeline.starts_s[stage][position], timeline.ends_s[stage][position]
            if position == 0 or not passes[position - 1].overlaps_next:
                spans.append(Span(name, start_s, end_s, 1, ""))
                # What it waits for is part of it.
                spans.append(Span("all-to-all", start_s, (start_s + end_s) / 2, 2, "ranks 0-1"))
        records.append(
            RankRecord(rank=rank, stage=stage, replica=replica, node="node", ready_s=0.0, spans=tuple(spans))
        )
    path = folder / "trace" / "step_2.json"
    path.parent.mkdir()
    write_chrome_trace(records, path, "planned")
    return path


def read(path: Path) -> Config:
    return load(path).config


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    config = layout_config("train.trace_step=2", **SIZES)
    folder = write_run(tmp_path / "run", config, TRUTH, share=0.0)
    write_planned_trace(folder, config)
    return folder


def test_one_traced_run_separates_passes_from_kernels(folder: Path) -> None:
    run = read_run(folder, read)
    assert [(each.chunk, each.is_forward) for each in run.passes] == [
        (chunk, is_forward) for chunk in range(4) for is_forward in (False, True)
    ]
    assert all(each.num_passes == 8 for each in run.passes)
    found = calibrated([run])
    assert {"kernels", "pass_ms"} <= {name for name in NAMES if found.constants[name].error is not None}
    assert found.rates.calibration.pass_ms == pytest.approx(TRUTH.pass_ms, rel=1e-4)
    assert found.rates.calibration.kernels == pytest.approx(TRUTH.kernels, rel=1e-4)
    assert "pass_ms" not in {
        name
        for name in NAMES
        if calibrated([read_run(folder, read, reads_trace=False)]).constants[name].error is not None
    }


def number_alone(passes: Sequence[Pass]) -> int:
    return len(passes) - 2 * sum(each.overlaps_next for each in passes)


def test_overlapped_passes_are_left_out(tmp_path: Path) -> None:
    config = layout_config("train.trace_step=2", *OVERLAPS, **SIZES)
    folder = write_run(tmp_path / "run", config, TRUTH, share=0.0)
    write_planned_trace(folder, config)
    run = read_run(folder, read)
    # Only passes of warm-up and cool-down run alone.
    alone = sum(2 * number_alone(stage.passes) for stage in plan_pipeline(config).stages)
    assert 0 < sum(each.num_passes for each in run.passes) == alone < 4 * 8 * 2


def test_traces_of_gpus_are_left_alone(folder: Path) -> None:
    """Their spans are the host's."""
    from k25_train.config.cluster import Device
    from k25_train.plan.calibrate.traced import traced_passes

    config = read(folder / "config.yaml")
    on_gpus = replace(config, cluster=replace(config.cluster, device=Device.cuda))
    assert traced_passes(folder, config)
    assert traced_passes(folder, on_gpus) == ()
    (folder / "trace" / "step_2.json").unlink()
    assert traced_passes(folder, config) == ()


def without_last_pass(events: list[dict[str, Any]]) -> list[dict[str, Any]]:
    last = max((event for event in events if event["name"] == "backward"), key=lambda event: event["ts"])
    return [event for event in events if event is not last]


DAMAGES: dict[str, Callable[[list[dict[str, Any]]], Any]] = {
    "a pass is missing": without_last_pass,
    "a rank that there is not": lambda events: [event | {"tid": 9} for event in events],
    "another direction": lambda events: [
        event | {"name": "forward"} if event["name"] == "backward" else event for event in events
    ],
    "no duration": lambda events: [{"ph": "X", "name": "forward", "tid": 0, "ts": 0.0}],
    "no list": lambda events: 3,
    "no events of this form": lambda events: [[]],
}


@pytest.mark.parametrize("damage", DAMAGES.values(), ids=DAMAGES)
def test_damaged_traces_are_told_with_a_remedy(damage: Callable[[Any], Any], folder: Path) -> None:
    path = folder / "trace" / "step_2.json"
    events = json.loads(path.read_text())["traceEvents"]
    path.write_text(json.dumps({"traceEvents": damage(events)}))
    with pytest.raises(TraceError, match=r"step_2\.json: .*--no-trace"):
        read_run(folder, read)
    assert read_run(folder, read, reads_trace=False).passes == ()
    path.write_text("{")
    with pytest.raises(TraceError, match=r"is not the timeline of a step"):
        read_run(folder, read)
