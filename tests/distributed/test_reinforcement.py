"""Whole runs of reinforcement learning: on several ranks as on one, killed and gone on with."""

from pathlib import Path

import pytest

from k25_train.data.trajectories.reading import StepFile
from k25_train.metrics.sinks import number, read_rows
from tests.helpers.ranks import run_ranks
from tests.helpers.rl_runs import REAL, SCRIPTED, fit_rl, rl_overrides, write_rl_data


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_rl_data(tmp_path_factory.mktemp("rl") / "data")


def test_a_run_trains_on_what_it_rolled_out(data: Path, tmp_path: Path) -> None:
    arguments = rl_overrides(data, tmp_path, "train.eval_interval=3")
    assert run_ranks(fit_rl, 1, arguments, REAL) == [6]
    rows = read_rows(tmp_path / "metrics.jsonl")
    assert [row["step"] for row in rows] == [*range(7)]
    for row in rows[1:]:
        assert number(row["staleness_max"]) == 0
        assert number(row["policy/gap_max"]) <= 1e-5
        assert number(row["probe_gap_max"]) <= 1e-5
        assert number(row["rollout/groups"]) == 2
    assert all(0 <= number(row["eval_reward"]) <= 1 for row in (rows[0], rows[3], rows[6]))
    files = [StepFile(tmp_path / f"rollouts/step_{step}.safetensors") for step in range(1, 7)]
    groups = [facts["group"] for file in files for facts in file.facts]
    assert groups == [group for group in range(12) for _ in range(3)]
