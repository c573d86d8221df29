"""When a run saves."""

from types import SimpleNamespace
from typing import Any

from k25_train.training.cadence import SaveCadence
from k25_train.training.soundness import Verdict

SOUND, SKIPPED = Verdict(), Verdict("its gradient was not finite", was_skipped=True)


def cadence(steps: int | None = None, seconds: float | None = None, **named: Any) -> SaveCadence:
    config: Any = SimpleNamespace(interval_steps=steps, interval_s=seconds)
    return SaveCadence(config, **({"has_clock": True} | named))


def test_a_skipped_step_puts_a_save_off_until_a_sound_one() -> None:
    by_steps = cadence(steps=3)
    verdicts = [SOUND, SOUND, SKIPPED, SKIPPED, SOUND, SOUND, SOUND]
    due = [
        step
        for step, verdict in enumerate(verdicts, start=1)
        if by_steps.is_due(step, verdict, time_is_up=by_steps.time_is_up)
    ]
    assert due == [5, 6]


def test_time_counts_from_the_last_save_by_one_clock() -> None:
    now = [100.0]
    main, other = (cadence(seconds=60.0, has_clock=each, clock=lambda: now[0]) for each in (True, False))
    due = []
    for step in range(1, 11):
        now[0] += 25
        # What the rank with the clock says, all hear.
        if is_due := main.is_due(step, SOUND, time_is_up=main.time_is_up):
            due.append(step)
            main.restart()
        assert not other.time_is_up
        assert other.is_due(step, SOUND, time_is_up=is_due) == is_due
    assert due == [3, 6, 9]


def test_time_that_is_up_on_a_skipped_step_is_not_forgotten() -> None:
    now = [0.0]
    by_time = cadence(seconds=10.0, clock=lambda: now[0])
    now[0] = 11.0
    assert not by_time.is_due(1, SKIPPED, time_is_up=True)
    assert by_time.is_due(2, SOUND, time_is_up=False)
