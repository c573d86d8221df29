"""A stage that takes over optimizer state goes on as the run before would have."""

from collections.abc import Sequence
from pathlib import Path

import pytest

from tests.helpers.interrupted_runs import FOUR_RANKS, ONE_RANK, rows, short_run
from tests.helpers.parity import TOLERANCE
from tests.helpers.ranks import RankContext, run_ranks
from tests.helpers.runs import fit

pytestmark = pytest.mark.distributed

AFTER = 5
"""Steps of the run that is gone on from."""
Found = tuple[list[tuple[float, float]], list[str], dict[str, bool]]
"""(loss and gradient norm of each step, notes, part -> whether it begins with moments)."""


def go_on(context: RankContext, arguments: Sequence[str]) -> Found | str:
    """Start from weights, and take the two steps that the run before would have taken; or why not."""
    from k25_train.checkpoint.initial import start_from_weights
    from k25_train.checkpoint.pieces import OPTIMIZER_STATE, pieces
    from k25_train.errors import CheckpointError
    from k25_train.training.step import train_step
    from tests.helpers.runs import start_run

    run = start_run(context, arguments)
    with run.data:
        try:
            started = start_from_weights(run.config, run.modules, run.optimizer)
        except CheckpointError as error:
            return str(error)
        moments: dict[str, bool] = {}
        for piece in pieces(run.modules, run.optimizer):
            name = piece.part.name
            if name.startswith(f"{OPTIMIZER_STATE}.") and ".param." not in name:
                part = name.split(".")[3]
                moments[part] = moments.get(part, False) or bool(piece.tensor.any())
        results = [train_step(run, step) for step in (AFTER + 1, AFTER + 2)]
    return [(each.loss, each.grad_norm) for each in results], list(started.notes), moments


def told(run: Path) -> list[tuple[float, float]]:
    """Loss and gradient norm of these steps in a finished run."""
    steps = {row["step"]: row for row in rows(run)}
    return [(steps[step]["loss"], steps[step]["grad_norm"]) for step in (AFTER + 1, AFTER + 2)]  # type: ignore[misc]


@pytest.mark.parametrize("sizes", [ONE_RANK, FOUR_RANKS])
def test_steps_are_those_of_the_run_before(
    sizes: Sequence[str], run_alone: Path, data: Path, tmp_path: Path
) -> None:
    source = f"checkpoint.init_from={run_alone}/checkpoints/step_{AFTER}"
    arguments = short_run(data, tmp_path, *sizes, source)
    ranks = 4 if sizes is FOUR_RANKS else 1
    expected = told(run_alone)
    with_state, notes, _ = run_ranks(go_on, ranks, [*arguments, "checkpoint.init_optimizer=true"])[0]
    assert f"optimizer state after {AFTER} updates" in "\n".join(notes)
    for found, step in zip(with_state, expected, strict=True):
        assert found == pytest.approx(step, rel=TOLERANCE)
    if ranks == 1:
        without, notes, moments = run_ranks(go_on, 1, arguments)[0]
        assert without[0] == pytest.approx(expected[0], rel=TOLERANCE), "the weights are the same"
        assert without[1] != pytest.approx(expected[1], rel=1e-3), "but not the moments"
        assert "optimizer state" not in "\n".join(notes)
        assert not any(moments.values())


def test_another_rule_has_no_use_for_the_state(run_alone: Path, data: Path, tmp_path: Path) -> None:
    """One of Muon's momentum would do for AdamW by name, and the other way round."""
    source = f"checkpoint.init_from={run_alone}/checkpoints/step_{AFTER}"
    other = ("checkpoint.init_optimizer=true", "optim.vision_tower.name=adamw")
    text = run_ranks(go_on, 1, short_run(data, tmp_path, *ONE_RANK, source, *other))[0]
    assert "updated by another rule there, with exp_avg, not exp_avg, exp_avg_sq" in text
    assert "vision_tower." in text
    assert "checkpoint.init_optimizer=false" in text


def test_momentum_is_no_first_moment(data: Path, tmp_path: Path) -> None:
    first, few = tmp_path / "first", ("train.steps=2", "optim.warmup=1", "optim.decay=1")
    saved = ("checkpoint.interval=2", "train.eval_interval=2", "optim=adamw")
    run_ranks(fit, 1, short_run(data, first, *ONE_RANK, *few, *saved))
    source = (f"checkpoint.init_from={first}/checkpoints/step_2", "checkpoint.init_optimizer=true")
    text = run_ranks(go_on, 1, short_run(data, tmp_path / "second", *ONE_RANK, *source))[0]
    assert "updated by another rule there, with exp_avg, exp_avg_sq, not exp_avg" in text


def test_what_was_frozen_or_is_fresh_begins_without_moments(data: Path, tmp_path: Path) -> None:
    first, few = tmp_path / "first", ("train.steps=2", "optim.warmup=1", "optim.decay=1")
    frozen = ("optim.vision_tower.trained=false", "checkpoint.interval=2", "train.eval_interval=2")
    run_ranks(fit, 1, short_run(data, first, *ONE_RANK, *few, *frozen))
    source = (f"checkpoint.init_from={first}/checkpoints/step_2", "checkpoint.init_optimizer=true")
    fresh = (*source, "checkpoint.init_fresh=['mm_projector.*']")
    _, notes, moments = run_ranks(go_on, 1, short_run(data, tmp_path / "second", *ONE_RANK, *fresh))[0]
    assert moments == {"language_model": True, "vision_tower": False, "mm_projector": False}
    assert "fresh for vision_tower" in "\n".join(notes)
