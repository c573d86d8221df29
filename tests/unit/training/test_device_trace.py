"""What a device did is traced with the phases as ranges, the optimizer's also in a step that is too long."""

import json
import threading
from pathlib import Path
from unittest import mock

import pytest
import torch

from k25_train.training import device_trace
from k25_train.training.device_trace import ProfiledTrace
from parallel.watchdog.phases import PhaseTracker


def overlapped_passes(tracker: PhaseTracker, number: int) -> None:
    """Two phases around a product; the one that began first ends first."""
    first, second = tracker.phase(f"first {number}"), tracker.phase(f"second {number}")
    first.__enter__()
    second.__enter__()
    torch.ones(4, 4) @ torch.ones(4, 4)
    first.__exit__(None, None, None)
    second.__exit__(None, None, None)


def traced_names(folder: Path, num_passes: int) -> list[str]:
    """Names in the trace of so many passes and an optimizer."""
    tracker = PhaseTracker(0)
    trace = ProfiledTrace(torch.device("cpu"))
    trace.start()
    tracker.recorder = trace.recorder
    for number in range(num_passes):
        overlapped_passes(tracker, number)
    with tracker.phase("optimizer"):
        torch.ones(4).sqrt()
        with tracker.phase("all-gather"):
            torch.ones(4).exp()
    tracker.recorder = None
    trace.stop()
    path = folder / "trace" / "step.json"
    trace.write(path)
    assert len(trace.recorder.spans) == 2 * num_passes + 2, "the timeline has every phase"
    events = json.loads(path.read_text())["traceEvents"]
    return [event["name"] for event in events if event["ph"] == "X"]


def test_phases_are_ranges_around_operators(tmp_path: Path) -> None:
    names = traced_names(tmp_path, 2)
    assert {"first 0", "second 0", "first 1", "second 1", "optimizer", "all-gather"} <= set(names)
    assert names.count("aten::mm") == 2
    assert not torch.autograd._profiler_enabled()


def test_of_a_long_step_the_first_passes_and_the_optimizer_are_traced(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(device_trace, "MOST_PHASES", 6)
    names = traced_names(tmp_path, 10)
    assert names.count("aten::mm") == 3
    assert "first 2" in names and "first 3" not in names and "first 9" not in names
    assert {"optimizer", "all-gather", "aten::sqrt", "aten::exp"} <= set(names)


def test_only_the_thread_that_profiles_bounds_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(device_trace, "MOST_PHASES", 1)
    trace = ProfiledTrace(torch.device("cpu"))
    tracker = PhaseTracker(0)
    tracker.recorder = trace.recorder
    with mock.patch.object(trace, "collect") as collect:
        of_backward = threading.Thread(target=overlapped_passes, args=(tracker, 0))
        of_backward.start()
        of_backward.join()
        collect.assert_not_called()
        overlapped_passes(tracker, 1)
        collect.assert_called_once_with(False)


def test_on_cuda_phases_are_nvtx_ranges_in_any_order(monkeypatch: pytest.MonkeyPatch) -> None:
    nvtx: list[tuple[str, str]] = []
    monkeypatch.setattr(torch.cuda.nvtx, "range_start", lambda name: nvtx.append(("start", name)) or name)
    monkeypatch.setattr(torch.cuda.nvtx, "range_end", lambda name: nvtx.append(("end", name)))
    tracker = PhaseTracker(0)
    tracker.recorder = ProfiledTrace(torch.device("cuda")).recorder
    overlapped_passes(tracker, 0)
    assert nvtx == [("start", "first 0"), ("start", "second 0"), ("end", "first 0"), ("end", "second 0")]


def test_a_trace_that_cannot_be_written_says_so(tmp_path: Path) -> None:
    trace = ProfiledTrace(torch.device("cpu"))
    trace.start()
    trace.stop()
    (tmp_path / "trace").write_text("a file where a folder should be")
    with pytest.raises(OSError, match="trace"):
        trace.write(tmp_path / "trace" / "step.json")
