"""Pictures through engine, judge and trainer: what is sampled behind an image is trained behind it."""

from pathlib import Path

import pytest

from k25_train.metrics.sinks import number, read_rows
from k25_train.rl.conversations import answers_path, read_answers
from tests.helpers.ranks import run_ranks
from tests.helpers.rl_runs import REAL, fit_rl, rl_overrides, write_rl_data

COUNTING = (
    "environment=counting",
    "environment.tasks.counting.num_tasks=20",
    "train.steps=2",
    "train.seq_len=128",
    "rollout.max_prompt_tokens=44",
    "train.eval_interval=2",
)


@pytest.mark.parametrize("mode", ["coupled", pytest.param("decoupled", marks=pytest.mark.slow)])
def test_pictures_are_trained_as_they_were_seen(mode: str, tmp_path: Path) -> None:
    data = write_rl_data(tmp_path / "data")
    of_sums = ("environment=", "environment.tasks.sums", "dep.mode")
    own = [each for each in rl_overrides(data, tmp_path / "run") if not each.startswith(of_sums)]
    assert run_ranks(fit_rl, 1, [*own, *COUNTING, f"dep.mode={mode}"], REAL) == [2]
    rows = read_rows(tmp_path / "run" / "metrics.jsonl")
    for row in rows[1:]:
        # Groups of three responses to two prompts, each with its picture of four tokens.
        assert number(row["images"]) == 6
        assert number(row["vision_tokens"]) == 24
        assert number(row["policy/gap_max"]) <= 1e-5
    answers = read_answers(answers_path(tmp_path / "run" / "rollouts", 2))
    assert len(answers) == 3
    assert all(len(answer.images) == 1 and answer.prompt.startswith("[image]") for answer in answers)
