"""The restart policy, on histories of every kind."""

import itertools
from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from launch.blame.verdict import STRENGTH, Confidence, Kind, Verdict
from launch.history import Attempt, Outcome
from launch.recurrence import may_pass_over, suspects
from launch.restart_policy import (
    LONGEST_WAIT_S,
    MAX_FRUITLESS_STOPS,
    MAX_UNSAVED,
    choose_nodes,
    nodes_for,
    num_fruitless,
    outcome_of,
    reason_to_give_up,
    wait_before_restart_s,
)

NODES = ["n1", "n2", "n3", "n4"]


def attempts(*ended: tuple[Outcome, int | None] | tuple[Outcome, int | None, str]) -> list[Attempt]:
    """A history of outcomes, last steps and, if given, the nodes that failed first."""
    return [
        Attempt(
            number=number, job_id=1, nodes=NODES, code="abc", outcome=outcome, reached=reached,
            first_to_fail=first[0] if first else None,
        )
        for number, (outcome, reached, *first) in enumerate(ended, start=1)
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("status", "reached", "asked", "lost", "expected"),
    [
        (0, 20, False, [], Outcome.finished),
        (0, 20, True, [], Outcome.finished),
        (0, 7, False, [], Outcome.stopped),
        (0, 7, True, [], Outcome.stopped),
        (0, None, True, [], Outcome.stopped),
        (137, 7, True, [], Outcome.stopped),
        (137, 7, False, [], Outcome.failed),
        (137, 20, False, [], Outcome.failed),
        (137, 7, False, ["n2"], Outcome.node_lost),
        (1, None, False, [], Outcome.failed),
    ],
)
def test_outcome(status: int, reached: int | None, asked: bool, lost: list[str], expected: Outcome) -> None:
    assert outcome_of(status, reached, 20, asked_to_stop=asked, lost=lost) is expected


def test_skipped_steps_are_named_as_the_reason() -> None:
    history = [replace(attempt, skipped=11) for attempt in attempts((Outcome.failed, 2), (Outcome.failed, 2))]
    reason = reason_to_give_up(history, 3)
    assert reason is not None and reason.startswith(
        "attempts 1 and 2 both failed after step 2 (attempt 2 then "
    )
    assert "skipped 11 steps, whose gradients were not finite: lower optim.lr" in reason
    lost = [
        replace(attempt, skipped=3, number=n)
        for n, attempt in enumerate(attempts((Outcome.node_lost, 2)) * 5, start=1)
    ]
    assert "made no progress (attempt 5 then skipped 3 steps" in str(reason_to_give_up(lost, 3))


def test_two_failures_at_one_step_are_no_accident() -> None:
    history = attempts((Outcome.failed, 7), (Outcome.failed, 7))
    assert reason_to_give_up(history, 3) == ("attempts 1 and 2 both failed after step 7: this is no accident")
    before = attempts((Outcome.failed, None), (Outcome.failed, None))
    assert "both failed before its first step" in str(reason_to_give_up(before, 3))


@pytest.mark.parametrize(
    "history",
    [
        attempts(),
        attempts((Outcome.failed, 7)),
        attempts((Outcome.failed, 7), (Outcome.failed, 8)),
        attempts((Outcome.failed, 7), (Outcome.failed, None)),
        attempts((Outcome.node_lost, 7), (Outcome.node_lost, 7)),
        attempts((Outcome.failed, 7), (Outcome.node_lost, 7)),
        attempts((Outcome.stopped, 7), (Outcome.stopped, 7), (Outcome.stopped, 7)),
        attempts(*((Outcome.stopped, 7) for _ in range(MAX_FRUITLESS_STOPS + 1))),
        attempts(*((Outcome.stopped, step) for step in range(50))),
        attempts(*((Outcome.failed, step) for step in range(50))),
    ],
)
def test_a_run_goes_on(history: list[Attempt]) -> None:
    assert reason_to_give_up(history, 3) is None


def test_stops_that_leave_no_time_for_a_step_end() -> None:
    first = attempts((Outcome.stopped, 7))
    stops = attempts(*((Outcome.stopped, None) for _ in range(MAX_FRUITLESS_STOPS)))
    assert reason_to_give_up([*first, *stops], 3) is None
    again = [*first, *stops, *attempts((Outcome.stopped, 7))]
    assert "11 attempts in a row were stopped before they trained another step" in str(
        reason_to_give_up(again, 3)
    )
    assert reason_to_give_up([*again, *attempts((Outcome.stopped, 8))], 3) is None


def test_a_preemption_between_does_not_hide_that_a_step_fails() -> None:
    history = attempts((Outcome.failed, 7), (Outcome.stopped, 5), (Outcome.failed, 7))
    assert "attempts 1 and 3 both failed after step 7" in str(reason_to_give_up(history, 9))


def test_restarts_that_get_no_further_are_limited() -> None:
    history = attempts(*((Outcome.node_lost, step) for step in (9, 3, 5, 9)))
    assert reason_to_give_up(history[:3], 2) == (
        "3 attempts in a row made no progress, --max-restarts 2 are allowed"
    )
    assert reason_to_give_up(history[:3], 3) is None
    assert "4 attempts" in str(reason_to_give_up(history, 3))
    assert reason_to_give_up([*history, *attempts((Outcome.node_lost, 10))], 3) is None


def test_faults_that_never_reach_a_checkpoint_are_limited() -> None:
    """Each trains a step more than the one before, and each loses what it gained."""
    faults = attempts(*((Outcome.failed, 500 + number) for number in range(MAX_UNSAVED + 2)))
    at_500 = [replace(attempt, saved=500) for attempt in faults]
    assert reason_to_give_up(at_500[:-2], 3) is None
    assert "21 attempts in a row failed before the next checkpoint, the newest is of step 500" in str(
        reason_to_give_up(at_500[:-1], 3)
    )
    assert reason_to_give_up([*at_500[:-1], replace(at_500[-1], saved=520)], 3) is None
    # Records of earlier versions do not say, and stops are no faults.
    assert reason_to_give_up(faults, 3) is None
    assert reason_to_give_up([replace(each, outcome=Outcome.stopped) for each in at_500], 3) is None


def test_no_restart_is_allowed_with_zero() -> None:
    assert reason_to_give_up(attempts((Outcome.vanished, None)), 0) is not None
    assert reason_to_give_up(attempts((Outcome.stopped, 4)), 0) is None


def test_waits_double_up_to_a_limit_and_start_again_with_progress() -> None:
    fruitless = attempts(*((Outcome.node_lost, 5) for _ in range(9)))
    waits = [wait_before_restart_s(fruitless[:number], 30.0) for number in range(1, 10)]
    assert waits[:5] == [30, 60, 120, 240, 480]
    assert set(waits[5:]) == {LONGEST_WAIT_S}
    assert wait_before_restart_s([*fruitless, *attempts((Outcome.node_lost, 6))], 30.0) == 30


@given(st.lists(st.tuples(st.sampled_from(Outcome), st.none() | st.integers(0, 9)), max_size=12))
def test_every_history_that_goes_on_gets_further_or_ends(ended: list[tuple[Outcome, int | None]]) -> None:
    """Whatever happens, faults alone cannot keep a run busy forever."""
    history = attempts(*ended)
    if reason_to_give_up(history, 3) is None:
        assert num_fruitless(history) <= 3


def unfit(num_unfit: int, num_nodes: int) -> Attempt:
    """An attempt whose preflight failed on some of its nodes."""
    why = dict.fromkeys(NODES[:num_unfit], "gpus: 7 GPUs")
    return replace(attempts((Outcome.unfit, None))[0], nodes=NODES[:num_nodes], unfit=why)


def test_a_preflight_that_fails_everywhere_finds_no_node_at_fault() -> None:
    assert "all 4 nodes of attempt 1 failed preflight" in str(reason_to_give_up([unfit(4, 4)], 3))
    assert reason_to_give_up([unfit(3, 4)], 3) is None
    assert reason_to_give_up([unfit(1, 1)], 3) is None, "another node may be sound"
    assert reason_to_give_up([unfit(4, 4), *attempts((Outcome.stopped, 7))], 3) is None


def test_a_preflight_that_leaves_nodes_out_is_no_restart() -> None:
    failures = attempts((Outcome.failed, 7))
    assert num_fruitless([*failures, unfit(1, 4), unfit(2, 4)]) == num_fruitless(failures)
    assert "both failed after step 7" in str(reason_to_give_up([*failures, unfit(1, 4), *failures], 3))


def test_a_node_that_fails_first_twice_in_a_row_is_suspected() -> None:
    once = attempts((Outcome.failed, 7, "n2"), (Outcome.failed, 9, "n3"), (Outcome.failed, 11, "n2"))
    assert suspects(once) == {}
    twice = attempts((Outcome.failed, 7, "n2"), (Outcome.stopped, 8), (Outcome.failed, 9, "n2"))
    assert suspects(twice) == {"n2": "it was to blame in attempts 1, 3; srun reported it first"}


def test_nodes_are_as_many_as_the_run_may_have() -> None:
    assert choose_nodes(NODES, [], [2, 4]) == NODES
    assert choose_nodes(NODES, ["n1"], [2, 4]) == ["n2", "n3"]
    assert choose_nodes(NODES, ["n2", "n4"], [2, 4]) == ["n1", "n3"]
    assert choose_nodes(NODES, ["n1", "n2", "n3"], [2, 4]) == []
    assert choose_nodes(NODES, ["n3"], [2]) == ["n1", "n2"], "the others are spares"


def test_a_suspected_node_is_used_where_the_run_could_not_go_on_without() -> None:
    assert nodes_for(NODES, [], ["n1"], [3]) == ["n2", "n3", "n4"]
    assert nodes_for(NODES, [], ["n1"], [4]) == NODES
    assert nodes_for(NODES, ["n4"], ["n1"], [3]) == ["n1", "n2", "n3"]


@given(st.sets(st.sampled_from(NODES)), st.sets(st.integers(1, 4), min_size=1))
def test_the_most_nodes_are_chosen(unfit: set[str], legal: set[int]) -> None:
    chosen = choose_nodes(NODES, unfit, sorted(legal))
    assert not unfit & set(chosen)
    assert chosen == sorted(chosen)
    sound = len(NODES) - len(unfit)
    possible = [count for count in legal if count <= sound]
    assert len(chosen) == max(possible, default=0)


def test_every_pair_of_outcomes_has_a_decision() -> None:
    for pair in itertools.product(Outcome, repeat=2):
        reason = reason_to_give_up(attempts(*((outcome, 7) for outcome in pair)), 3)
        assert (reason is not None) == (pair == (Outcome.failed, Outcome.failed))


def blamed(node: str | None, kind: Kind = Kind.stopped, step: int | None = 7, *, error: str = "") -> Attempt:
    """A failure with a verdict."""
    confidence = STRENGTH[kind][1] if node else Confidence.none
    verdict = Verdict(node=node, kind=kind, confidence=confidence, error=error, reason=f"{kind} on {node}")
    return replace(attempts((Outcome.failed, step))[0], blame=verdict)


def numbered(*history: Attempt) -> list[Attempt]:
    return [replace(attempt, number=number) for number, attempt in enumerate(history, start=1)]


def test_convincing_evidence_counts_whenever_it_comes_and_weak_evidence_at_once() -> None:
    between = attempts((Outcome.failed, 9))
    far_apart = numbered(blamed("n2"), *between, blamed("n3"), *between, blamed("n2", Kind.killed))
    assert list(suspects(far_apart)) == ["n2"]
    assert suspects(far_apart)["n2"] == "it was to blame in attempts 1, 5; killed on n2"
    weak = [blamed("n2", Kind.first), *between, blamed("n2", Kind.first)]
    assert suspects(numbered(*weak)) == {}
    assert list(suspects(numbered(*weak, blamed("n2", Kind.first)))) == ["n2"]
    assert list(suspects(numbered(blamed("n2", Kind.fault), blamed("n2", Kind.killed)))) == ["n2"]


def test_a_node_that_is_lost_twice_is_left_out_when_it_is_back() -> None:
    lost = replace(blamed("n2", Kind.node_lost), outcome=Outcome.node_lost)
    assert list(suspects(numbered(lost, lost))) == ["n2"]
    assert suspects(numbered(lost, replace(lost, outcome=Outcome.stopped))) == {}


def test_a_step_is_tried_once_without_the_node_that_was_to_blame() -> None:
    twice = numbered(blamed("n2"), blamed("n2"))
    assert reason_to_give_up(twice, 9, {"n2"}) is None
    assert "both failed after step 7" in str(reason_to_give_up(twice, 9))
    assert "both failed after step 7" in str(reason_to_give_up(numbered(*twice, blamed("n2")), 9, {"n2"}))
    assert "both failed after step 7" in str(
        reason_to_give_up(numbered(*twice, blamed("n1")), 9, {"n1", "n2"})
    )
    # Another step in between: it is the node again, not the step.
    assert reason_to_give_up(numbered(blamed("n2", step=5), *twice), 9, {"n2"}) is None
    weak = numbered(blamed("n2", Kind.first), blamed("n2", Kind.first))
    assert "both failed after step 7" in str(reason_to_give_up(weak, 9, {"n2"}))


@pytest.mark.parametrize("kind", [Kind.shared, Kind.named_error])
def test_the_same_named_error_ends_a_run_that_came_no_further(kind: Kind) -> None:
    node = "n2" if kind == Kind.named_error else None
    first = blamed(node, kind, 6, error="DataError: shard_7: 7 bytes")
    again = blamed(node, kind, None, error="DataError: shard_7: 9 bytes")
    assert "(DataError: shard_7: 9 bytes)" in str(reason_to_give_up(numbered(first, again), 9, {"n2"}))
    further = replace(again, reached=8)
    assert reason_to_give_up(numbered(first, further), 9, {"n2"}) is None
    other = replace(again, blame=replace(again.blame or Verdict(), error="DataError: shard_8"))
    assert reason_to_give_up(numbered(first, other), 9, {"n2"}) is None


def test_one_checkpoint_is_passed_over_until_a_step_is_trained() -> None:
    unloadable = blamed(None, Kind.checkpoint, None)
    passed = replace(unloadable, passed_over="step_8")
    assert reason_to_give_up(numbered(passed), 3) is None
    assert "no other one is there" in str(reason_to_give_up(numbered(unloadable), 3))
    assert "neither step_8 nor" in str(reason_to_give_up(numbered(passed, unloadable), 3))
    assert (
        may_pass_over([])
        and not may_pass_over([passed])
        and not may_pass_over([passed, blamed(None, step=None)])
    )
    assert may_pass_over([passed, blamed("n1", step=9), unloadable])
    # Nor is it one of two failures before the first step.
    assert reason_to_give_up(numbered(passed, *attempts((Outcome.failed, None))), 3) is None
