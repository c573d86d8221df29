"""Several subscribers of one layer of hooks: their order, overlapped passes, waiting, and errors."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest

from parallel.megatron.before_pass import WorkBeforePasses
from parallel.megatron.patches import instrument, pass_hooks
from parallel.megatron.patches.in_flight import WorkInFlight
from parallel.megatron.patches.pass_hooks import Passes, PassHooks, subscribed
from parallel.watchdog.phases import PhaseTracker

FORWARD_TO_NEXT = {
    "tensor_send_prev": None,
    "tensor_recv_prev": None,
    "tensor_send_next": "tensor",
    "tensor_recv_next": "tensor",
    "prev_pipeline_rank": 0,
    "next_pipeline_rank": 2,
}
"""Arguments of megatron-core's exchange: rank 1 sends to and receives from rank 2."""


class Log(PassHooks):
    """Writes down when each of its contexts is entered and left."""

    def __init__(self, events: list[str], name: str) -> None:
        self.events = events
        self.name = name

    @contextmanager
    def _within(self, event: str) -> Iterator[None]:
        self.events.append(f"{self.name} > {event}")
        try:
            yield
        finally:
            self.events.append(f"{self.name} < {event}")

    def around_pass(self, passes: Passes) -> Any:
        return self._within(passes.value)

    def around_exchange(self, peers: tuple[int, ...]) -> Any:
        return self._within(f"exchange {peers}")

    def around_wait(self, direction: str, peers: tuple[int, ...]) -> Any:
        return self._within(f"{direction} {peers}")

    def around_finalize(self) -> Any:
        return self._within("finalize")


class Schedule:
    """The functions that a schedule calls, hooked; each says which phases the rank is in."""

    def __init__(self, events: list[str], tracker: PhaseTracker) -> None:
        def run(what: str) -> Callable[..., Any]:
            return lambda *_, **__: events.append(f"{what} in {tracker.state().phases}")

        class Work:
            wait = staticmethod(run("wait"))

        def combined(_data: str, f_model: Any, b_model: Any, *, config: str = "") -> None:
            run("combined")()

        def start(**_: Any) -> dict[str, Any]:
            run("start")()
            return {"send_next": Work()}

        self.forward = pass_hooks.hooked_pass(run("forward"), Passes.forward)
        self.combined = pass_hooks.hooked_combined(combined)
        self.exchange = pass_hooks.hooked_exchange(start)
        self.finalize = pass_hooks.hooked_finalize(run("finalize"))


@pytest.fixture
def events() -> list[str]:
    return []


@pytest.fixture
def schedule(events: list[str], monkeypatch: pytest.MonkeyPatch) -> Schedule:
    """A schedule whose passes are traced, as in a run."""
    tracker = PhaseTracker(1)
    monkeypatch.setattr(instrument, "_tracker", tracker)
    monkeypatch.setattr(pass_hooks, "_subscribers", [instrument.TracePasses()])
    return Schedule(events, tracker)


def test_work_comes_before_the_phase_of_a_pass_or_of_waiting(schedule: Schedule, events: list[str]) -> None:
    with subscribed(WorkBeforePasses([lambda done: events.append(f"work after {done}")])):
        schedule.forward()
        works = schedule.exchange(**FORWARD_TO_NEXT)
        works["send_next"].wait()
        schedule.combined("data", "model", "model")
        schedule.finalize()
    assert events == [
        "work after 0",
        "forward in ('forward',)",
        "start in ('pipeline send/recv',)",
        "work after 1",
        "wait in ('pipeline send',)",
        "work after 1",
        "combined in ('forward and backward',)",
        "work after 3",
        "finalize in ()",
    ]


def test_a_third_subscriber_is_called_outside_of_the_others(schedule: Schedule, events: list[str]) -> None:
    work = WorkBeforePasses([lambda done: events.append(f"work after {done}")])
    with subscribed(work), subscribed(Log(events, "third")):
        works = schedule.exchange(**FORWARD_TO_NEXT)
        works["send_next"].wait()
        schedule.finalize()
    assert events == [
        "third > exchange (2, 2)",
        "start in ('pipeline send/recv',)",
        "third < exchange (2, 2)",
        "third > send (2,)",
        "work after 0",
        "wait in ('pipeline send',)",
        "third < send (2,)",
        "third > finalize",
        "work after 0",
        "finalize in ()",
        "third < finalize",
    ]
    events.clear()
    works["send_next"].wait()
    schedule.forward()
    assert events == ["wait in ('pipeline send',)", "forward in ('forward',)"], "subscriptions have ended"


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (("data", "model", None), Passes.forward),
        (("data", None, "model"), Passes.backward),
        (("data", "model", "model"), Passes.both),
    ],
)
@pytest.mark.parametrize("by_name", [False, True])
def test_the_overlapped_step_is_what_its_models_say(
    arguments: tuple[Any, ...], expected: Passes, by_name: bool, schedule: Schedule, events: list[str]
) -> None:
    seen = []
    with subscribed(Log(events, "log")), subscribed(WorkBeforePasses([seen.append])):
        if by_name:
            schedule.combined(arguments[0], b_model=arguments[2], f_model=arguments[1])
        else:
            schedule.combined(*arguments, config="c")
        schedule.finalize()
    assert events[:3] == [
        f"log > {expected.value}",
        f"combined in ('{expected.value}',)",
        f"log < {expected.value}",
    ]
    assert seen == [0, 2 if expected is Passes.both else 1]


def test_a_pass_that_fails_is_not_counted_and_leaves_every_context(
    schedule: Schedule, events: list[str]
) -> None:
    def fail() -> None:
        raise ValueError("out of memory")

    seen: list[int] = []
    failing = pass_hooks.hooked_pass(fail, Passes.forward)
    with subscribed(Log(events, "log")), subscribed(WorkBeforePasses([seen.append])):
        with pytest.raises(ValueError, match="out of memory"):
            failing()
        schedule.forward()
        schedule.finalize()
    assert events[:3] == ["log > forward", "log < forward", "log > forward"]
    assert events[3] == "forward in ('forward',)", "the phase of the pass that failed has ended"
    assert seen == [0, 0, 1]


def test_work_that_fails_keeps_the_pass_from_running(schedule: Schedule, events: list[str]) -> None:
    def fail(_num_done: int) -> None:
        raise ValueError("no space")

    with (
        subscribed(WorkBeforePasses([fail])),
        subscribed(Log(events, "log")),
        pytest.raises(ValueError, match="no space"),
    ):
        schedule.forward()
    assert events == ["log > forward", "log < forward"]


def test_without_subscribers_functions_are_called_as_they_are(
    schedule: Schedule, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(pass_hooks, "_subscribers", [])
    assert pass_hooks.hooked_pass(lambda value: value + 1, Passes.forward)(1) == 2
    assert pass_hooks.hooked_finalize(lambda value: value + 1)(1) == 2
    handle = schedule.exchange(**FORWARD_TO_NEXT)["send_next"]
    assert isinstance(handle, WorkInFlight)
    assert handle.wait() is None


def test_one_handle_for_both_directions_waits_for_both_neighbours(
    schedule: Schedule, events: list[str]
) -> None:
    class Work:
        def wait(self) -> str:
            return "done"

    start = pass_hooks.hooked_exchange(lambda **_: [Work()])
    with subscribed(Log(events, "log")):
        (work,) = start(**{**FORWARD_TO_NEXT, "tensor_recv_next": None, "tensor_recv_prev": "tensor"})
        assert work.wait() == "done"
    assert events[2] == "log > send/recv (0, 2)"
