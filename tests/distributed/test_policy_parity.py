"""Reinforcement learning in layouts trains like one process: losses, gradients, figures and evaluations."""

from pathlib import Path

import pytest

from tests.helpers.parity import Case
from tests.helpers.policy_runs import CASES, PTX, SERIAL, PolicyRuns

TOLERANCE = 1e-6


@pytest.fixture(scope="module")
def runs(data: Path, tmp_path_factory: pytest.TempPathFactory) -> PolicyRuns:
    return PolicyRuns(data, tmp_path_factory.mktemp("policy"), num_steps=2)


@pytest.mark.parametrize(
    "case",
    [
        case if number == 0 else pytest.param(case, marks=pytest.mark.slow)
        for number, case in enumerate(CASES)
    ],
    ids=lambda case: case.name,
)
def test_a_layout_trains_like_one_process(runs: PolicyRuns, case: Case) -> None:
    expected, found = runs.of(SERIAL, *PTX), runs.of(case, *PTX)
    assert found.difference(expected) <= TOLERANCE
    # What is reported, and what is held out.
    assert found.figures == pytest.approx(expected.figures, rel=1e-5)
    assert found.evaluation == pytest.approx(expected.evaluation, rel=1e-5)
    assert {"policy/mask_share", "policy/gap_p99", "text_loss"} <= found.figures.keys()
    assert {"eval_text_loss", "eval_caption_loss"} <= found.evaluation.keys()
    assert 0 < found.figures["policy/mask_share"] < 1
