"""Steps next to their plan: what is said of them, and when."""

from dataclasses import replace

import pytest

from k25_train.compose.resolve import compose
from k25_train.metrics.pace import COMPARED_STEPS, PLANNED, WARM_UP_STEPS, Pace
from k25_train.plan.time.plan_step import expected_step_s


def told(planned_s: float | None, step_times_s: list[float]) -> list[str]:
    pace, texts = Pace(lambda _step: planned_s), []
    for step, step_time_s in enumerate(step_times_s, 1):
        pace.figures(step)
        texts.append(pace.add(step_time_s))
    return [text for text in texts if text]


@pytest.mark.parametrize(("step_s", "word"), [(1.2, "20% longer"), (0.8, "20% shorter")])
def test_steps_that_are_far_from_their_plan_are_told_once(step_s: float, word: str) -> None:
    texts = told(1.0, [9.0] * WARM_UP_STEPS + [step_s] * 100)
    assert len(texts) == 1
    assert word in texts[0]
    assert "train.trace_step" in texts[0]


def test_a_slow_beginning_and_single_slow_steps_are_not_told() -> None:
    assert not told(1.0, [9.0] * WARM_UP_STEPS + [1.1, 1.1, 1.1, 7.0] * 25)
    assert not told(1.0, [9.0] * (WARM_UP_STEPS + COMPARED_STEPS - 1))


def test_without_a_plan_nothing_is_told() -> None:
    assert not told(None, [9.0] * 100)
    assert Pace(lambda _step: None).figures(1) == {}
    assert Pace(lambda step: 2.0 * step).figures(3) == {PLANNED: 6.0}


def test_steps_of_each_size_have_a_plan_of_their_own() -> None:
    """Of a ramp that begins with batches half as large."""
    pace = Pace(lambda step: 1.0 if step < 20 else 2.0)
    for step in range(1, 40):
        pace.figures(step)
        assert not pace.add(1.0 if step < 20 else 2.0)


def test_cpus_have_a_plan_once_they_are_calibrated() -> None:
    config = compose(["experiment=smoke"])
    assert expected_step_s(config) is None
    rates = config.cluster.rates
    fitted = replace(rates, calibration=replace(rates.calibration, kernels=1.5))
    config.cluster = replace(config.cluster, rates=fitted)
    assert expected_step_s(config) is not None
    assert expected_step_s(compose(["experiment=smoke_8gpu"])) is not None
