"""A recorder keeps each phase of a tracker that begins and ends while it is attached."""

import itertools

import pytest

from parallel.watchdog.phases import PhaseTracker
from parallel.watchdog.recorder import Recorder, Span


def recorded_tracker() -> tuple[PhaseTracker, Recorder]:
    """A tracker of rank 1 whose clock goes on by a second whenever it is read, and its recorder."""
    seconds = itertools.count(100)
    tracker, recorder = PhaseTracker(1, lambda: float(next(seconds))), Recorder()
    tracker.recorder = recorder
    return tracker, recorder


def test_nested_phases_are_kept_with_times_depth_and_peers() -> None:
    tracker, recorder = recorded_tracker()
    with tracker.training(1), tracker.phase("forward"), tracker.phase("all-to-all", lambda: [2, 0, 1, 3]):
        pass
    assert recorder.spans == [
        Span("all-to-all", 103.0, 104.0, 2, "ranks 0, 2-3"),
        Span("forward", 102.0, 105.0, 1, ""),
        Span("train", 101.0, 106.0, 0, ""),
    ]


def test_phases_may_end_in_any_order() -> None:
    tracker, recorder = recorded_tracker()
    forward, backward = tracker.phase("forward"), tracker.phase("backward", (0, 1))
    forward.__enter__()
    backward.__enter__()
    forward.__exit__(None, None, None)
    backward.__exit__(None, None, None)
    assert recorder.spans == [
        Span("forward", 101.0, 103.0, 0, ""),
        Span("backward", 102.0, 104.0, 1, "rank 0"),
    ]


def test_phases_of_one_name_are_told_apart() -> None:
    tracker, recorder = recorded_tracker()
    for _ in range(3):
        with tracker.phase("forward"):
            pass
    assert [span.start_s for span in recorder.spans] == [101.0, 103.0, 105.0]


def test_a_phase_that_ends_with_an_error_is_kept() -> None:
    tracker, recorder = recorded_tracker()
    with pytest.raises(ValueError, match="x"), tracker.phase("forward"):
        raise ValueError("x")
    assert [span.name for span in recorder.spans] == ["forward"]


def test_what_begins_before_or_ends_after_is_left_out() -> None:
    tracker, recorder = recorded_tracker()
    tracker.recorder = None
    with tracker.phase("evaluate"):
        tracker.recorder = recorder
        with tracker.phase("forward"):
            pass
    with tracker.phase("backward"):
        tracker.recorder = None
    with tracker.phase("optimizer"):
        pass
    assert [(span.name, span.depth) for span in recorder.spans] == [("forward", 1)]
    assert tracker.state().phases == ()
