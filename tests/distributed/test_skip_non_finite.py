"""A gradient that is not finite: nothing changes, on every rank alike, and it is known where it was."""

from pathlib import Path
from typing import Any

import pytest
import torch

from tests.helpers.interrupted_runs import rows
from tests.helpers.ranks import RankContext, run_ranks
from tests.helpers.runs import layout, overrides, start_run

pytestmark = pytest.mark.distributed

SMOKE_LAYOUT = {"pp": 2, "vpp": 2, "ep": 2, "dp": 2}
SPOILT = "language_model.decoder.layers.2.self_attention.linear_proj.weight"


def spoil_gradients(context: RankContext, arguments: list[str], steps: list[int]) -> tuple[list[bool], str]:
    """Train with a NaN on one rank in the gradient of one weight in some steps.

    Returns whether each step changed this rank's weights, and what ended the run.
    """
    from k25_train.errors import TrainingError
    from k25_train.metrics.report import Report
    from k25_train.training import trainer
    from parallel.megatron.replicas import complete_parameters

    run = start_run(context, arguments)
    names = run.optimizer._names
    weights = [parameter for module in run.modules for parameter in module.parameters()]
    norm, real_step, changes, ended = run.optimizer.get_grad_norm, trainer.train_step, [], "finished"
    now = [0]

    def spoilt_norm() -> float:
        for parameter, name in names.items():
            if name == SPOILT and now[0] in steps and run.topology.dp_rank == 1:
                parameter.main_grad.fill_(float("nan"))
        return norm()

    def watched_step(run: Any, step: int) -> object:
        now[0] = step
        # The encoder's weights are still on their way after a step.
        complete_parameters(run.modules)
        before = [weight.detach().clone() for weight in weights]
        result = real_step(run, step)
        complete_parameters(run.modules)
        changes.append(any(not torch.equal(a, b) for a, b in zip(before, weights, strict=True)))
        return result

    run.optimizer.get_grad_norm = spoilt_norm
    trainer.train_step = watched_step
    with Report(run.config, is_main=run.is_main, device_name="CPU") as report, run.data:
        try:
            trainer.Trainer(run, report).fit()
        except TrainingError as error:
            ended = str(error)
    return changes, ended


@pytest.mark.parametrize("name", ["adamw", "muonclip"])
def test_a_spoilt_step_is_left_out_on_every_rank(name: str, data: Path, tmp_path: Path) -> None:
    arguments = overrides(
        data, tmp_path / "run", *layout(**SMOKE_LAYOUT), f"optim={name}",
        "train.steps=5", "optim.warmup=1", "optim.decay=1", "optim.max_skipped_steps=1",
    )  # fmt: skip
    for changes, ended in run_ranks(spoil_gradients, 4, arguments, [2, 4]):
        assert changes == [True, False, True, False, True]
        assert ended == "finished"
    metrics = rows(tmp_path / "run")
    assert [row["grad_norm"] is None for row in metrics if "loss" in row] == [False, True, False, True, False]


def test_too_many_in_a_row_end_the_run_which_goes_on_from_weights_that_a_step_was_taken_from(
    data: Path, tmp_path: Path
) -> None:
    run = tmp_path / "run"
    arguments = [
        *overrides(data, run, *layout(**SMOKE_LAYOUT), "optim.max_skipped_steps=1", "checkpoint.interval=1"),
        *("train.steps=6", "optim.warmup=1", "optim.decay=1"),
    ]
    for changes, ended in run_ranks(spoil_gradients, 4, arguments, [3, 4]):
        assert changes == [True, True, False, False]
        assert "2 gradients in a row were not finite, optim.max_skipped_steps=1 are allowed" in ended
        assert f"in {SPOILT}. Its state is set aside as {run}/checkpoints/step_4.unsound" in ended
        assert f"The last sound checkpoint is {run}/checkpoints/step_1: lower optim.lr" in ended
    # No step from the weights of step 2 was sound.
    left = sorted(path.name for path in (run / "checkpoints").glob("step_*"))
    assert left == ["step_1", "step_2.unsound", "step_4.unsound"]
    for changes, ended in run_ranks(spoil_gradients, 4, arguments, []):
        assert changes == [True] * 5
        assert ended == "finished"
