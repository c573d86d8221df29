"""Memory for activations that is not there: told before the first step, or with the checkpoint whole."""

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from k25_train.checkpoint.folders import newest_checkpoint
from k25_train.checkpoint.integrity import verify
from tests.helpers.interrupted_runs import rows, without_times
from tests.helpers.ranks import RankContext, RankError, run_ranks
from tests.helpers.runs import fit, layout, overrides, start_run

if TYPE_CHECKING:
    from k25_train.training.run import Run
    from k25_train.training.step import StepResult

pytestmark = pytest.mark.distributed

NUM_RANKS = 2
STEPS = "train.steps=6 checkpoint.interval=2 train.eval_interval=6 optim.warmup=1 optim.decay=2"


def arguments(data: Path, run: Path) -> list[str]:
    # The rank that fails in step 5 leaves while the others would still write step 4.
    waits = "checkpoint.asynchronous=false"
    return overrides(data, run, *STEPS.split(), *layout(pp=2, vpp=2), "activation=k2", waits)


def fit_until_the_host_is_full(context: RankContext, arguments: Sequence[str]) -> None:
    """The second rank's host memory is used up in the fifth step."""
    from k25_train.training import trainer
    from parallel.activations.pool import Block, HostBudgetError, HostPool

    train_step = trainer.train_step

    def refuse(pool: HostPool, num_bytes: int) -> Block:
        raise HostBudgetError(pool._explain(num_bytes))

    def train_step_with_less(run: "Run", step: int) -> "StepResult":
        if step == 5 and context.rank == 1:
            HostPool.take = refuse
        return train_step(run, step)

    trainer.train_step = train_step_with_less
    fit(context, arguments)


def test_a_full_host_ends_the_run_and_leaves_the_checkpoint(data: Path, tmp_path: Path) -> None:
    run, uninterrupted = tmp_path / "run", tmp_path / "uninterrupted"
    with pytest.raises(RankError) as failure:
        run_ranks(fit_until_the_host_is_full, NUM_RANKS, arguments(data, run))
    told = str(failure.value)
    assert "TrainingError: activation.host_gib = " in told
    assert "raise it, or offload fewer tensors; then start again" in told
    assert verify(newest_checkpoint(run / "checkpoints")).step == 4
    for folder in (run, uninterrupted):
        run_ranks(fit, NUM_RANKS, arguments(data, folder))
    resumed, whole = (
        [
            {key: value for key, value in row.items() if not key.startswith("offload_")}
            for row in without_times(rows(folder))
        ]
        for folder in (run, uninterrupted)
    )
    assert resumed == whole


def start_on_a_host_that_locks_nothing(context: RankContext, arguments: Sequence[str]) -> None:
    from parallel.host.copier import ThreadCopier
    from parallel.host.memory import HostMemoryError

    def pin(_copier: ThreadCopier, _memory: object) -> None:
        raise HostMemoryError("cudaHostRegister fails with error 2")

    ThreadCopier.pin = pin
    start_run(context, arguments)


def test_a_host_that_cannot_lock_memory_is_told_of_before_the_first_step(data: Path, tmp_path: Path) -> None:
    with pytest.raises(RankError) as failure:
        run_ranks(start_on_a_host_that_locks_nothing, NUM_RANKS, arguments(data, tmp_path / "run"))
    told = str(failure.value)
    assert "ConfigError: activation.host_gib: the host has no " in told
    assert "ulimit -l" in told
