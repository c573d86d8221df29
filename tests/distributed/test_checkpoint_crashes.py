"""Crashes of jobs that save: whatever ends them, a whole checkpoint comes up, or what is broken is named."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.helpers.checkpoint_crashes.trials import KINDS, can_mount, kinds, run_trial


def survives(kind: str, seed: int, folder: Path) -> None:
    if kind == "disk full" and not can_mount(folder / "disk"):
        kind = "file too large"
    trial = run_trial(kind, seed, folder / str(seed))
    assert not trial.problems, f"{kind}, {trial.text}: " + "; ".join(trial.problems)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where all trials find the checkpoints that they begin with."""
    return tmp_path_factory.mktemp("crashes")


@pytest.mark.parametrize("kind", KINDS)
def test_a_crash_of_each_kind(kind: str, folder: Path) -> None:
    survives(kind, list(KINDS).index(kind), folder)


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(100, 200))
def test_a_hundred_crashes(seed: int, folder: Path) -> None:
    survives(kinds(100)[seed - 100], seed, folder)
