"""What a device did is traced with the phases as ranges, and ends with the step or before."""

import json
from pathlib import Path

import pytest
import torch

from k25_train.training import device_trace
from k25_train.training.device_trace import DeviceTrace
from parallel.watchdog.phases import PhaseTracker


def traced_names(folder: Path, num_phases: int) -> list[str]:
    """Names in the trace of a product within each of so many phases that overlap."""
    tracker = PhaseTracker(0)
    trace = DeviceTrace(torch.device("cpu"))
    tracker.recorder = trace.recorder
    with trace:
        for number in range(num_phases):
            first, second = tracker.phase(f"first {number}"), tracker.phase(f"second {number}")
            first.__enter__()
            second.__enter__()
            torch.ones(4, 4) @ torch.ones(4, 4)
            # The one that began first ends first.
            first.__exit__(None, None, None)
            second.__exit__(None, None, None)
    trace.write(folder / "trace" / "step.json")
    assert len(trace.recorder.spans) == 2 * num_phases
    events = json.loads((folder / "trace" / "step.json").read_text())["traceEvents"]
    return [event["name"] for event in events if event["ph"] == "X"]


def test_phases_are_ranges_around_operators(tmp_path: Path) -> None:
    names = traced_names(tmp_path, 2)
    assert {"first 0", "second 0", "first 1", "second 1", "aten::mm"} <= set(names)


def test_a_long_step_is_traced_in_part(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(device_trace, "MOST_PHASES", 5)
    names = traced_names(tmp_path, 10)
    assert names.count("aten::mm") == 2
    assert "first 9" not in names
