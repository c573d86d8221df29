"""A recorder keeps each phase of a watch that begins and ends while it is attached."""

import itertools

import pytest

from parallel.watchdog.phases import PhaseTracker
from parallel.watchdog.recorder import Recorder, Span


def recorded_watch() -> tuple[PhaseTracker, Recorder]:
    """A watch of rank 1 whose clock goes on by a second whenever it is read, and its recorder."""
    seconds = itertools.count(100)
    watch, recorder = PhaseTracker(1, lambda: float(next(seconds))), Recorder()
    watch.recorder = recorder
    return watch, recorder


def test_nested_phases_are_kept_with_times_depth_and_peers() -> None:
    watch, recorder = recorded_watch()
    with watch.training(1), watch.phase("forward"), watch.phase("all-to-all", lambda: [2, 0, 1, 3]):
        pass
    assert recorder.spans == [
        Span("all-to-all", 103.0, 104.0, 2, "ranks 0, 2-3"),
        Span("forward", 102.0, 105.0, 1, ""),
        Span("train", 101.0, 106.0, 0, ""),
    ]


def test_phases_may_end_in_any_order() -> None:
    watch, recorder = recorded_watch()
    forward, backward = watch.phase("forward"), watch.phase("backward", (0, 1))
    forward.__enter__()
    backward.__enter__()
    forward.__exit__(None, None, None)
    backward.__exit__(None, None, None)
    assert recorder.spans == [
        Span("forward", 101.0, 103.0, 0, ""),
        Span("backward", 102.0, 104.0, 1, "rank 0"),
    ]


def test_phases_of_one_name_are_told_apart() -> None:
    watch, recorder = recorded_watch()
    for _ in range(3):
        with watch.phase("forward"):
            pass
    assert [span.start_s for span in recorder.spans] == [101.0, 103.0, 105.0]


def test_a_phase_that_ends_with_an_error_is_kept() -> None:
    watch, recorder = recorded_watch()
    with pytest.raises(ValueError, match="x"), watch.phase("forward"):
        raise ValueError("x")
    assert [span.name for span in recorder.spans] == ["forward"]


def test_what_begins_before_or_ends_after_is_left_out() -> None:
    watch, recorder = recorded_watch()
    watch.recorder = None
    with watch.phase("evaluate"):
        watch.recorder = recorder
        with watch.phase("forward"):
            pass
    with watch.phase("backward"):
        watch.recorder = None
    with watch.phase("optimizer"):
        pass
    assert [(span.name, span.depth) for span in recorder.spans] == [("forward", 1)]
    assert watch.state().phases == ()
