"""The bench of crashes sees what it is to see."""

import json
from pathlib import Path
from random import Random
from typing import Any

import numpy as np
import pytest

from k25_train.environments.base import scored
from k25_train.rollout.journal import Journal
from k25_train.rollout.journal_state import admitted, consumed
from k25_train.rollout.records import Record
from k25_train.rollout.response_records import ended, judged, restarted
from k25_train.rollout.trajectory import Ended, Group, Response
from tests.bench.rollout_crashes import Trial, ks_p_value, main, violations, wrong_with
from tests.helpers.rollout_crash_job import crc_of, seed_of, step_file
from tests.helpers.scripted_engine import drawn_at, logprob_of, token_of

SEED = seed_of("walk0", 0)


def told(**changes: Any) -> dict[str, Any]:
    """A response of a turn of two tokens, of two versions."""
    drawn = [drawn_at(version, crc_of(version), SEED, version) for version in (0, 1)]
    values = {
        "group": 0, "task": "walk0", "turns": 1, "tokens": [5, *(token_of(d, 0) for d in drawn)],
        "logprobs": [0.0, *map(logprob_of, drawn)], "versions": [-1, 0, 1],
    }  # fmt: skip
    return values | changes


def test_tokens_that_engines_did_not_draw_are_seen() -> None:
    right = told()
    if right["tokens"][2] == 0:
        pytest.skip("an end")
    assert wrong_with(right) == ""
    assert "token 1 of turn 0" in wrong_with(told(versions=[-1, 0, 0]))
    assert wrong_with(told(turns=2)) == "1 turns, not 2"


def left(folder: Path, records: list[Record], consumes: int = 1) -> list[str]:
    """What the bench says of a journal of one task."""
    folder.mkdir()
    journal = Journal(folder / "journal")
    group = Group(number=0, task="walk0", epoch=0, version=0, stamp={}, responses=[Response()])
    for record in [admitted(group), *records, consumed(1, (0,))]:
        journal.append(record)
    journal.close()
    step_file(folder, 1).write_text(json.dumps([told()] * consumes))
    return violations(Trial(folder, 1, 1, Random(0)))


def test_ends_that_are_missing_or_come_twice_are_seen(tmp_path: Path) -> None:
    end, verdict = ended(0, 0, Response(), Ended.STOP), judged(0, 0, scored(1.0, {}))
    assert left(tmp_path / "a", [end, verdict]) == []
    assert left(tmp_path / "b", [verdict]) == ["task 0 has no end"]
    assert left(tmp_path / "c", [end, verdict, end]) == ["('ended', 0, 0) is in the journal 2 times"]
    again = [end, restarted(0, 0, 1, "killed", has_failed=False)]
    assert left(tmp_path / "f", [*again, verdict]) == ["task 0 has no end"]
    assert left(tmp_path / "g", [*again, ended(0, 0, Response(attempt=1), Ended.STOP), verdict]) == []
    assert left(tmp_path / "d", [end, verdict], consumes=2) == ["task 0 was trained 2 times"]
    assert left(tmp_path / "e", [end, verdict], consumes=0) == ["task 0 was trained 0 times"]


def test_lengths_that_are_biased_are_told_from_those_that_are_not() -> None:
    rng = np.random.default_rng(0)
    first, second = rng.geometric(0.02, 2000), rng.geometric(0.02, 2000)
    assert ks_p_value(first, second) > 0.05
    # A tenth of the long ones lost.
    kept = second[(second < 60) | (rng.random(2000) > 0.5)]
    assert ks_p_value(first, kept) < 0.001
    assert ks_p_value([1, 2, 3], [1, 2, 3]) == 1.0


@pytest.mark.slow
def test_a_few_kills_break_nothing(tmp_path: Path) -> None:
    assert main(["--kills", "6", "--tasks", "120", "--per-step", "20", "--dir", str(tmp_path / "run")]) == 0
