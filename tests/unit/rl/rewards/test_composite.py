"""How rules, budget and rubrics make one reward."""

import math

import pytest

from k25_train.environments.base import Status, Verdict, failed, scored, unscored
from k25_train.rl.rewards.composite import combined, on_top, within_budget
from k25_train.rl.rewards.rules.length import over_budget


@pytest.mark.parametrize(
    ("num_tokens", "budget", "over"),
    [(0, 10, 0.0), (10, 10, 0.0), (15, 10, 0.5), (20, 10, 1.0), (90, 10, 1.0), (9, 0, 0.0)],
)
def test_over_budget(num_tokens: int, budget: int, over: float) -> None:
    assert over_budget(num_tokens, budget) == over


def test_rules_are_averaged_by_weight_and_parts_named_by_rule() -> None:
    verdict = combined(
        {"ocr": scored(0.5, {"accuracy": 0.5}), "boxes": scored(1.0, {"accuracy": 1.0, "matched": 2.0})},
        {"ocr": 3.0, "boxes": 1.0},
    )
    assert verdict.reward == verdict.accuracy == pytest.approx(0.625)
    assert verdict.parts == {
        "accuracy": pytest.approx(0.625),
        "ocr/accuracy": 0.5,
        "boxes/accuracy": 1.0,
        "boxes/matched": 2.0,
    }


@pytest.mark.parametrize(
    ("first", "second", "status", "reward"),
    [
        (scored(1.0, {}), failed("empty: it is"), Status.SCORED, 0.5),
        (failed("empty: it is"), failed("no code: none"), Status.FAILED, 0.0),
        (scored(1.0, {}), unscored("judge raised: it did"), Status.UNSCORED, math.nan),
        (failed("empty: it is"), unscored("judge raised: it did"), Status.UNSCORED, math.nan),
    ],
)
def test_failed_counts_zero_and_unscored_counts_nothing(
    first: Verdict, second: Verdict, status: Status, reward: float
) -> None:
    verdict = combined({"a": first, "b": second}, {"a": 1.0, "b": 1.0})
    assert verdict.status is status
    assert verdict.reward == pytest.approx(reward, nan_ok=True)


def test_the_budget_cuts_what_was_earned_and_nothing_else() -> None:
    right, wrong = scored(1.0, {"accuracy": 1.0}), scored(0.0, {"accuracy": 0.0})
    assert within_budget(right, 15, 10, 0.5).reward == 0.75
    assert within_budget(right, 15, 10, 0.5).accuracy == 1.0
    assert within_budget(wrong, 1, 10, 0.5).reward == within_budget(wrong, 99, 10, 0.5).reward == 0.0
    # A negative reward does not get better with length.
    assert within_budget(scored(-1.0, {}), 99, 10, 0.5).reward == -1.0
    assert math.isnan(within_budget(unscored("judge raised: it did"), 5, 10, 0.5).reward)
    assert within_budget(failed("empty: it is"), 5, 10, 0.5).parts["tokens"] == 5.0


def test_rubrics_come_on_top_of_what_is_verified() -> None:
    rubric = {"style": scored(0.5, {"style/clear": 0.5})}
    assert on_top(scored(0.8, {"accuracy": 0.8}), rubric, {"style": 0.5}).reward == pytest.approx(1.0)
    assert on_top(scored(0.8, {"accuracy": 0.8}), rubric, {"style": 0.5}).accuracy == 0.8
    assert on_top(scored(0.8, {}), rubric, {"style": 0.5}).parts["style/clear"] == 0.5
    assert on_top(scored(0.0, {}), rubric, {"style": 0.5}).reward == 0.0
    broken = on_top(scored(0.8, {}), {"style": unscored("rubric style: 500")}, {"style": 0.5})
    assert broken.status is Status.UNSCORED
