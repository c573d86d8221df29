"""Verdicts are scored, failed or unscored, and nothing between."""

import json
import math

import pytest

from k25_train.environments.base import Status, Verdict, failed, scored, unscored


@pytest.mark.parametrize(
    "verdict",
    [
        scored(0.25, {"accuracy": 0.5}),
        scored(-1.0, {}),
        failed("is empty", {"length": 0.5}),
        unscored("timed out"),
    ],
)
def test_a_verdict_survives_a_journal(verdict: Verdict) -> None:
    # Strict JSON: NaN is not in it.
    read = Verdict.from_json(json.loads(json.dumps(verdict.as_json(), allow_nan=False)))
    assert read.as_json() == verdict.as_json()
    assert math.isnan(read.reward) == (read.status is Status.UNSCORED)


@pytest.mark.parametrize(
    ("status", "reward", "reason"),
    [
        (Status.UNSCORED, 0.0, "timed out"),
        (Status.UNSCORED, math.nan, ""),
        (Status.SCORED, math.nan, ""),
        (Status.SCORED, math.inf, ""),
        (Status.FAILED, 0.5, "is empty"),
        (Status.FAILED, 0.0, ""),
    ],
)
def test_nothing_between(status: Status, reward: float, reason: str) -> None:
    with pytest.raises(ValueError, match=status.value):
        Verdict(status=status, reward=reward, reason=reason)


def test_parts_are_finite() -> None:
    with pytest.raises(ValueError, match="length"):
        scored(1.0, {"length": math.nan})


def test_accuracy_is_the_answers_part() -> None:
    assert scored(0.5, {"accuracy": 1.0}).accuracy == 1.0
    assert scored(0.5, {}).accuracy == 0.5
    assert failed("is empty").accuracy == 0.0
    assert math.isnan(unscored("timed out").accuracy)
