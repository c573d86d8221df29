"""Saves while training goes on: the state of their step, whatever happens, and the run as if waited for."""

import os
import signal
import threading
from collections.abc import Sequence
from contextlib import ExitStack, redirect_stdout
from io import StringIO
from pathlib import Path
from typing import Any
from unittest import mock

import pytest

from tests.helpers.interrupted_runs import rows, without_times
from tests.helpers.ranks import RankContext, run_ranks
from tests.helpers.runs import layout, overrides, start_run
from tests.helpers.small_saves import SlowDisk

pytestmark = pytest.mark.distributed

SMALL = (
    "train.global_batch_size=4", "train.eval_sequences=2", "train.eval_interval=100", "optim.warmup_steps=0",
    "optim.decay_steps=0", "train.steps=8", "checkpoint.interval=4", "checkpoint.keep=9",
    "parallelism.overlap_grad_reduce=true", "parallelism.overlap_param_gather=true",
)  # fmt: skip
RANKS = layout(ep=2, dp=2)
ASYNCHRONOUS, WAITED_FOR = "checkpoint.asynchronous=true", "checkpoint.asynchronous=false"


def fit_on_slow_disk(
    context: RankContext, arguments: Sequence[str], slow_rank: int, signal_at: int
) -> dict[str, Any]:
    """Train, with a disk of one rank that writes nothing until a signal has come to the other.

    Returns what was printed, what ended it, and which checkpoints there were at the end of each step.
    """
    from k25_train.errors import K25Error
    from k25_train.metrics.report import Report
    from k25_train.training import trainer

    run = start_run(context, arguments)
    real_step, disk, printed, there = trainer.train_step, SlowDisk(), StringIO(), {}

    def noted_step(run: Any, step: int) -> object:
        result = real_step(run, step)
        there[step] = (
            sorted(path.name for path in run.checkpoints.iterdir()) if run.checkpoints.is_dir() else []
        )
        if step == signal_at:
            if context.rank != slow_rank:
                os.kill(os.getpid(), signal.SIGTERM)
            threading.Timer(0.2, disk.may_go_on.set).start()
        return result

    ended = "finished"
    with ExitStack() as stack:
        if context.rank == slow_rank:
            stack.enter_context(disk())
        stack.enter_context(mock.patch.object(trainer, "train_step", noted_step))
        stack.enter_context(redirect_stdout(printed))
        report = stack.enter_context(Report(run.config, is_main=run.is_main, device_name="CPU"))
        stack.enter_context(run.data)
        try:
            trainer.Trainer(run, report).fit()
        except K25Error as error:
            ended = f"{type(error).__name__}: {error}"
    return {"ended": ended, "printed": printed.getvalue(), "there": there}


def tensors_in(folder: Path) -> dict[str, bytes]:
    """The files of tensors of a checkpoint."""
    found = {path.name: path.read_bytes() for path in folder.glob("*.safetensors")}
    assert found, f"{folder} has no tensors"
    return found


def test_a_run_that_saves_behind_training_and_is_interrupted_is_one_that_waited(
    data: Path, tmp_path: Path
) -> None:
    """Two ranks whose weights are gathered during the passes; one writes nothing until a SIGTERM comes."""
    waited, behind = tmp_path / "waited", tmp_path / "behind"
    run_ranks(fit_on_slow_disk, 2, overrides(data, waited, *RANKS, *SMALL, WAITED_FOR), -1, -1)

    command = overrides(data, behind, *RANKS, *SMALL, ASYNCHRONOUS)
    first, _ = run_ranks(fit_on_slow_disk, 2, command, 1, 6)

    # 1. It trained while it wrote, and both saves were complete when it stopped.
    assert first["ended"] == "finished"
    assert first["there"][5] == first["there"][6] == ["step_4.partial"]
    assert "step 6 is to be saved, but the checkpoint of step 4 is not written yet" in first["printed"]
    assert "SIGTERM: checkpoint of step 6 saved; the same command goes on from there" in first["printed"]
    assert (behind / "checkpoints/latest").read_text() == "step_6\n"
    # 2. What was written is the state of the step.
    assert tensors_in(behind / "checkpoints/step_4") == tensors_in(waited / "checkpoints/step_4")
    # 3. The time is in the rows of the steps that saved or waited.
    by_step = {row["step"]: row for row in rows(behind)}
    assert [step for step, row in by_step.items() if "checkpoint_stall_s" in row] == [4, 5, 6]
    assert [step for step, row in by_step.items() if "checkpoint_write_s" in row] == [6]
    assert by_step[4]["checkpoint_stall_s"] < by_step[6]["checkpoint_stall_s"]

    # 4. It goes on, to the same end, bit by bit.
    (resumed, _) = run_ranks(fit_on_slow_disk, 2, command, -1, -1)
    assert resumed["ended"] == "finished"
    assert "resuming after step 6 of 8" in resumed["printed"]
    assert tensors_in(behind / "checkpoints/step_8") == tensors_in(waited / "checkpoints/step_8")
    assert without_times(rows(behind)) == without_times(rows(waited))
