"""Toggle against the report's formula in plain Python, its phases, budgets and state."""

import json
import math
import statistics
from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from k25_train.config.algorithm import ToggleConfig
from k25_train.rl.toggle import (
    AlternatingPhases,
    NoToggle,
    Phase,
    StartSample,
    ToggleGroup,
    lower_percentile,
    make_toggle,
)

CONFIG = ToggleConfig(enabled=True, interval=3, accuracy=0.6, percentile=0.25, samples=6, min_correct=2)
FAST, SLOW, RARE = "fast", "slow", "rare"
SAMPLES = [
    *(StartSample(FAST, tokens, True) for tokens in (9, 4, 7, 5, 30)),
    StartSample(FAST, 1, False),
    *(StartSample(SLOW, tokens, True) for tokens in (20, 40)),
    StartSample(RARE, 3, True),
]


def estimated(config: ToggleConfig = CONFIG) -> AlternatingPhases:
    toggle = AlternatingPhases(config)
    toggle.estimate(SAMPLES)
    return toggle


def group(rewards: list[float], tokens: list[int], **changes: object) -> ToggleGroup:
    found = ToggleGroup(
        problem=FAST, phase=Phase.BUDGET, rewards=rewards, accuracies=rewards, num_tokens=tokens
    )
    return replace(found, **changes)


def reference(
    config: ToggleConfig,
    budgets: dict[str, float],
    step: int,
    problem: str,
    rewards: list[float],
    tokens: list[int],
) -> list[float]:
    """K2.5, section 4.4, word for word."""
    if ((step - 1) // config.interval) % 2 == 1:
        return rewards
    solved = sum(rewards) / len(rewards) >= config.accuracy
    budget = budgets.get(problem, math.inf)
    return [r * float(not solved or y <= budget) for r, y in zip(rewards, tokens, strict=True)]


@settings(max_examples=60)
@given(
    step=st.integers(1, 40),
    interval=st.integers(1, 7),
    accuracy=st.sampled_from([0.0, 0.3, 0.5, 0.6, 1.0]),
    problem=st.sampled_from([FAST, SLOW, RARE, "never seen"]),
    members=st.lists(st.tuples(st.sampled_from([0.0, 0.5, 1.0]), st.integers(1, 50)), min_size=2, max_size=9),
)
def test_it_is_the_formula_of_the_report(
    step: int, interval: int, accuracy: float, problem: str, members: list[tuple[float, int]]
) -> None:
    config = replace(CONFIG, interval=interval, accuracy=accuracy)
    rewards, tokens = [each[0] for each in members], [each[1] for each in members]
    toggle = estimated(config)
    found = toggle.rewards(group(rewards, tokens, problem=problem, phase=toggle.phase(step)))
    assert found == reference(config, {FAST: 5, SLOW: 20}, step, problem, rewards, tokens)


@given(
    st.lists(st.integers(1, 1000), min_size=1, max_size=50), st.sampled_from([0.0, 0.1, 0.25, 0.5, 0.9, 1.0])
)
def test_a_budget_is_a_length_that_occurred_with_its_share_below(lengths: list[int], share: float) -> None:
    found = lower_percentile(lengths, share)
    assert found in lengths
    assert sum(length <= found for length in lengths) > share * (len(lengths) - 1)
    assert sum(length < found for length in lengths) <= share * (len(lengths) - 1)
    assert lower_percentile(lengths, 0.0) == min(lengths)
    assert lower_percentile(lengths, 1.0) == max(lengths)


def test_budgets_are_of_correct_responses_and_need_enough_of_them() -> None:
    toggle = estimated()
    assert toggle.budget(FAST) == 5
    assert toggle.budget(SLOW) == 20
    assert toggle.budget(RARE) == math.inf
    assert toggle.budget("never seen") == math.inf


def test_a_budget_may_be_used_up() -> None:
    assert estimated().rewards(group([1.0, 1.0], [5, 6])) == [1.0, 0.0]


def test_phases_alternate_and_begin_with_the_budget() -> None:
    toggle = estimated()
    assert [toggle.phase(step) is Phase.BUDGET for step in range(1, 10)] == [True] * 3 + [False] * 3 + [
        True
    ] * 3
    with pytest.raises(ValueError, match="counted from 1"):
        toggle.phase(0)


def test_a_group_keeps_the_phase_of_its_admission() -> None:
    toggle = estimated()
    admitted = group([1.0, 1.0], [4, 50], phase=toggle.phase(3))
    assert toggle.phase(4) is Phase.FREE
    assert toggle.rewards(admitted) == [1.0, 0.0]


def test_accuracy_is_the_gate_and_not_the_reward() -> None:
    toggle = estimated()
    right = group([0.2, 0.2], [4, 50], accuracies=[1.0, 1.0])
    wrong = group([1.0, 1.0], [4, 50], accuracies=[0.0, 1.0])
    assert toggle.rewards(right) == [0.2, 0.0]
    assert toggle.rewards(wrong) == [1.0, 1.0]


def test_an_unscored_response_stays_unscored_and_does_not_count() -> None:
    toggle = estimated()
    found = toggle.rewards(group([1.0, math.nan, 1.0], [50, 50, 4]))
    assert found[0] == 0.0 and math.isnan(found[1]) and found[2] == 1.0
    assert math.isnan(toggle.rewards(group([math.nan, math.nan], [50, 50]))[0])


def test_the_start_pass_takes_the_tasks_of_a_problem_in_turn() -> None:
    assert estimated().start_tasks({FAST: [7, 8], SLOW: [3]}) == [
        *((7, 0), (8, 0), (7, 1), (8, 1), (7, 2), (8, 2)),
        *((3, 0), (3, 1), (3, 2), (3, 3), (3, 4), (3, 5)),
    ]


def test_there_is_no_budget_before_the_start_pass_and_no_second_one() -> None:
    toggle = AlternatingPhases(CONFIG)
    assert not toggle.is_estimated
    with pytest.raises(ValueError, match="start pass"):
        toggle.rewards(group([1.0, 1.0], [4, 50]))
    toggle.estimate(SAMPLES)
    assert toggle.is_estimated
    with pytest.raises(ValueError, match="once"):
        toggle.estimate(SAMPLES)


@pytest.mark.parametrize("step", range(1, 9))
def test_a_run_that_is_resumed_within_a_phase_goes_on_as_it_was(step: int) -> None:
    whole = estimated()
    resumed = make_toggle(CONFIG, json.loads(json.dumps(whole.to_json())))
    assert resumed.is_estimated
    for later in range(step, step + 8):
        members = [
            group([1.0, 1.0, 0.0], [4, 50, 4], phase=toggle.phase(later)) for toggle in (whole, resumed)
        ]
        assert whole.rewards(members[0]) == resumed.rewards(members[1])
        assert whole.figures(members[:1]) == resumed.figures(members[1:])
    assert resumed.to_json() == whole.to_json()


def test_a_state_before_the_start_pass_has_it_done_after_the_resume() -> None:
    assert not make_toggle(CONFIG, AlternatingPhases(CONFIG).to_json()).is_estimated


@pytest.mark.parametrize("enabled", [True, False])
def test_what_is_no_state_is_refused(enabled: bool) -> None:
    with pytest.raises(ValueError, match="version 7"):
        make_toggle(replace(CONFIG, enabled=enabled), {"version": 7, "budgets": {}})


def test_switched_off_it_does_nothing_and_keeps_the_budgets() -> None:
    off = make_toggle(replace(CONFIG, enabled=False), estimated().to_json())
    assert isinstance(off, NoToggle)
    assert off.is_estimated and off.start_tasks({FAST: [1]}) == []
    assert {off.phase(step) for step in range(1, 30)} == {Phase.FREE}
    members = group([1.0, 1.0], [4, 5000])
    assert off.rewards(members) == [1.0, 1.0]
    assert off.figures([members]) == {}
    assert make_toggle(CONFIG, off.to_json()).to_json() == estimated().to_json()
    assert not make_toggle(CONFIG, NoToggle().to_json()).is_estimated


def test_figures_of_a_step() -> None:
    groups = [
        group([1.0, 1.0], [4, 50]),
        group([1.0, 0.0], [4, 6]),
        group([1.0, 1.0], [50, 50], problem=RARE),
        group([1.0, 1.0], [10, 30], problem=SLOW, phase=Phase.FREE),
    ]
    figures = estimated().figures(groups)
    assert figures["toggle/phase"] == 0.25
    assert figures["toggle/budget_tokens"] == statistics.mean([5, 5, 20])
    assert figures["toggle/over_budget_share"] == 3 / 8
    assert figures["toggle/gated_share"] == 1 / 3
    assert estimated().figures([]) == {}
