"""The judge of disturbed SLURM jobs passes what is right, and notices every planted violation."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest

from k25_train.run_folder.rows_file import Row
from tests.helpers.slurm_faults.evidence import FAILED, Ended, Evidence, Strike, left_out, steps_lost
from tests.helpers.slurm_faults.judge import Expected, problems_of
from tests.helpers.slurm_faults.kinds import KINDS, plan_of

ROWS: list[Row] = [{"step": step, "loss": 5.0 - step / 10, "grad_norm": 1.0} for step in range(25)]
NODES = ("n1", "n2", "n3")


def attempt(number: int, nodes: str, outcome: str, reached: int, **more: Any) -> Ended:
    """An attempt on nodes such as "n1 n3"."""
    facts = {"reason": f"{outcome}, of {nodes}", "reached": reached} | more
    return Ended(number=number, nodes=nodes.split(), outcome=outcome, **facts)


KILLED = Evidence(
    strikes=[Strike(attempt=1, node="n2", step=8), Strike(attempt=2, node="n2", step=10)],
    attempts=[
        attempt(1, "n1 n2", "failed", 8, blamed="n2", reason="first on n2"),
        attempt(2, "n1 n2", "failed", 10, blamed="n2", reason="first on n2"),
        attempt(3, "n1 n3", "finished", 24),
    ],
    state="COMPLETED",
    words="attempt 1 failed: first on n2",
    rows=ROWS,
    resumed={1: 0, 2: 6, 3: 6},
    allocated={1: NODES, 2: NODES, 3: NODES},
)
"""A rank on n2 was killed twice, and a spare took its place."""
TWICE = Expected(outcomes=frozenset({FAILED}), told=(r"\b{node}\b",), has_to_exclude=True, max_attempts=3)


def judged(expected: Expected = TWICE, **changes: Any) -> list[str]:
    return problems_of(expected, replace(KILLED, **changes), 2, ROWS)


def test_a_run_that_recovered_is_right() -> None:
    assert judged() == []


def other(place: int, **changes: Any) -> list[Ended]:
    """The attempts, of which one is another."""
    attempts = list(KILLED.attempts)
    attempts[place] = replace(attempts[place], **changes)
    return attempts


def rows_with(step: int, **changes: Any) -> list[Row]:
    return [dict(row) | (changes if row["step"] == step else {}) for row in ROWS]


PLANTED: dict[str, dict[str, Any]] = {
    "it did not finish: job FAILED": {"state": "FAILED"},
    "last attempt failed": {"attempts": other(2, outcome="failed")},
    "it did not recover alone: job FAILED": {"continued_from": "FAILED"},
    "attempt 1 ended stopped": {"attempts": other(0, outcome="stopped")},
    "13 steps were lost": {"resumed": {1: 0, 2: 1, 3: 4}},
    "it took 4 attempts": {
        "attempts": [
            *KILLED.attempts[:2],
            attempt(3, "n1 n3", "failed", 12),
            attempt(4, "n1 n3", "finished", 24),
        ]
    },
    "not told": {"words": "attempt 1 failed"},
    "ended failed without a reason": {"attempts": other(1, reason="")},
    "attempt 3 leaves out n1, which was not disturbed": {"attempts": other(2, nodes=["n2", "n3"])},
    "attempt 2 leaves out n2, which was to blame only 1 times": {"attempts": other(1, nodes=["n1", "n3"])},
    "attempt 2 leaves out n3, which was not disturbed": {"attempts": other(1, left_out=["n3"])},
    "the job leaves out n1, which was not disturbed": {"excluded": ["n1"]},
    "n2, which was hit, is kept": {"attempts": other(2, nodes=["n1", "n2"])},
    "attempt 2 blames n1 instead of n2": {"attempts": other(1, blamed="n1")},
    "the row of step 9 differs": {"rows": rows_with(9, loss=4.1000001)},
    "rows are missing: [3]": {"rows": [row for row in ROWS if row["step"] != 3]},
    "in the metrics twice: [5]": {"rows": sorted([*ROWS, ROWS[5]], key=lambda row: row["step"])},
    "left behind: process 9": {"left": ["process 9"]},
    "a refused submission left jobs": {"more": ["a refused submission left jobs"]},
    "it took place 1 of 2 times": {"strikes": KILLED.strikes[:1]},
}


@pytest.mark.parametrize("problem", PLANTED)
def test_what_is_wrong_is_noticed(problem: str) -> None:
    found = judged(**PLANTED[problem])

    assert any(problem in text for text in found), found


def test_losses_may_round_differently_only_where_the_number_of_nodes_changed() -> None:
    fewer = other(2, nodes=["n1"])
    allocated = {1: ["n1", "n2"], 2: ["n1", "n2"], 3: ["n1", "n2"]}
    near, far = rows_with(20, loss=3.0 * (1 + 5e-6)), rows_with(20, loss=3.0 * (1 + 2e-5))

    assert judged(rows=near) != []
    assert judged(attempts=fewer, allocated=allocated, rows=near) == []
    assert judged(attempts=fewer, allocated=allocated, rows=far) != []


def test_a_node_that_slurm_lost_is_replaced_at_once() -> None:
    lost = replace(
        KILLED,
        strikes=KILLED.strikes[:1],
        attempts=[attempt(1, "n1 n2", "node_lost", 8), attempt(2, "n1 n3", "finished", 24)],
        resumed={1: 0, 2: 6},
    )
    expected = replace(TWICE, outcomes=frozenset({"node_lost"}), strikes_to_exclude=1, max_attempts=2)

    assert problems_of(expected, lost, 1, ROWS) == []
    assert problems_of(replace(expected, strikes_to_exclude=2), lost, 1, ROWS) != []


def test_steps_are_lost_between_what_was_reached_and_where_it_went_on() -> None:
    assert steps_lost(KILLED) == 2 + 4
    # An attempt that did not come to train loses nothing itself.
    idle = attempt(3, "n1 n2", "failed", 0)
    attempts = [*KILLED.attempts[:2], idle, attempt(4, "n1 n2", "finished", 24)]
    assert steps_lost(replace(KILLED, attempts=attempts, resumed={1: 0, 2: 6, 4: 6})) == 6


@pytest.mark.parametrize(
    ("used", "allocated", "out"),
    [
        ("n1 n2", "n1 n2", set()),
        ("n1 n2", "n1 n2 n3", set()),
        ("n1 n3", "n1 n2 n3", {"n2"}),
        ("n2 n3", "n1 n2 n3", {"n1"}),
        ("n1", "n1 n2", {"n2"}),
        ("n2 n3", "n2 n3", set()),
        ("n1 n2", "", set()),
    ],
)
def test_a_spare_is_not_left_out(used: str, allocated: str, out: set[str]) -> None:
    assert left_out(attempt(1, used, "failed", 0), allocated.split(), 2) == out


def test_consecutive_seeds_have_every_kind_once_and_are_reproducible() -> None:
    drawn = [plan_of(seed) for seed in range(len(KINDS))]

    assert sorted(kind for kind, _ in drawn) == sorted(KINDS)
    assert [plan.text for _, plan in drawn] == [plan_of(seed)[1].text for seed in range(len(KINDS))]
    assert len({plan_of(seed, "rank killed")[1].text for seed in range(20)}) > 3
