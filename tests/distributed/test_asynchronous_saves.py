"""Saves while training goes on: the state of their step, whatever happens, and the run as if waited for."""

import errno
import math
import os
import signal
import threading
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager, redirect_stdout
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
    "train.global_batch_size=4", "train.eval_sequences=2", "train.eval_interval=100", "optim.warmup=0",
    "optim.decay=0", "train.steps=8", "checkpoint.interval=4", "checkpoint.keep=9",
    "parallelism.overlap_grad_reduce=true", "parallelism.overlap_param_gather=true",
)  # fmt: skip
RANKS = layout(ep=2, dp=2)
ASYNCHRONOUS, WAITED_FOR = "checkpoint.asynchronous=true", "checkpoint.asynchronous=false"


def fit_on_slow_disk(
    context: RankContext, arguments: Sequence[str], slow_rank: int, signal_at: int
) -> dict[str, Any]:
    """Train, with a disk of one rank that writes nothing until a signal has come to the other, and copies
    that last longer than the passes.

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
        if slow_rank >= 0:
            stack.enter_context(slow_copies(0.5))
        stack.enter_context(mock.patch.object(trainer, "train_step", noted_step))
        stack.enter_context(redirect_stdout(printed))
        report = stack.enter_context(Report(run.config, is_main=run.is_main, device_name="CPU"))
        stack.enter_context(run.data)
        try:
            trainer.Trainer(run, report).fit()
        except K25Error as error:
            ended = f"{type(error).__name__}: {error}"
    return {"ended": ended, "printed": printed.getvalue(), "there": there}


@contextmanager
def slow_copies(seconds: float) -> Iterator[None]:
    """Within: the copies of a save wait so long before the first of what updates change."""
    from k25_train.checkpoint.snapshot import Snapshot
    from parallel.host.copier import ThreadCopier

    take, copy, slow = Snapshot.take, ThreadCopier._copy, []

    def noting_take(self: Snapshot, pieces: Sequence[Any]) -> Any:
        slow[:] = [next(each.tensor.data_ptr() for each in pieces if not each.is_buffer)]
        return take(self, pieces)

    def slow_copy(self: ThreadCopier, source: Any, target: Any, delay_s: float) -> None:
        copy(self, source, target, seconds if source.data_ptr() in slow else delay_s)

    with (
        mock.patch.object(Snapshot, "take", noting_take),
        mock.patch.object(ThreadCopier, "_copy", slow_copy),
    ):
        yield


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


def fit_to_an_error(context: RankContext, arguments: Sequence[str], scene: str) -> tuple[str, int]:
    """Train to the end that a scene makes; what it was, and which step was being saved.

    "full": what rank 1 writes of step 4 finds no room, and it cannot even list the folder then. "not
    finite": the loss of the first step after a save begins is not, while rank 1 still writes.
    """
    from k25_train.checkpoint import failed_save
    from k25_train.checkpoint.files.writer import PartsWriter
    from k25_train.errors import K25Error
    from k25_train.metrics.report import Report
    from k25_train.training import step as step_module
    from k25_train.training.trainer import Trainer

    run, disk, saved = start_run(context, arguments), SlowDisk(), [0]
    check, write, is_hit = step_module._check_loss, PartsWriter.write, context.rank == 1

    def full(self: PartsWriter, piece: Any) -> None:
        if "step_4" in str(self._path):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        write(self, piece)

    def checked(step: int, loss: float) -> None:
        saved[0] = trainer.keeper.saver.step
        if saved[0]:
            threading.Timer(0.3, disk.may_go_on.set).start()
        check(step, math.nan if saved[0] and scene == "not finite" else loss)

    with ExitStack() as stack:
        if is_hit and scene == "full":
            stack.enter_context(mock.patch.object(PartsWriter, "write", full))
            unreadable = mock.Mock(newest_checkpoint=mock.Mock(side_effect=OSError(errno.EIO, "unreadable")))
            stack.enter_context(mock.patch.object(failed_save, "folders", unreadable))
        elif is_hit:
            stack.enter_context(disk())
        stack.enter_context(mock.patch.object(step_module, "_check_loss", checked))
        report = stack.enter_context(Report(run.config, is_main=run.is_main, device_name="CPU"))
        stack.enter_context(run.data)
        stack.enter_context(run.claim)
        trainer = Trainer(run, report)
        try:
            trainer.fit()
        except K25Error as error:
            return f"{type(error).__name__}: {error}", saved[0]
    return "finished", 0


def names_in(run: Path) -> list[str]:
    return sorted(path.name for path in (run / "checkpoints").iterdir())


def test_what_fails_on_one_rank_or_on_all_ends_all_and_leaves_the_save_before_it(
    data: Path, tmp_path: Path
) -> None:
    """The second run saves by the clock."""
    many = [each for each in SMALL if not each.startswith(("train.steps", "checkpoint.interval"))]
    command = overrides(data, tmp_path / "run", *RANKS, *many, ASYNCHRONOUS, "train.steps=60")

    # 1. A full disk of one rank is told on all, at the next step.
    by_steps = [*command, "checkpoint.interval=2"]
    (error, _), (other, _) = run_ranks(fit_to_an_error, 2, by_steps, "full")
    assert error == other
    assert error.startswith("CheckpointError: ") and "step_4.partial: could not be written (rank 1: " in error
    assert "No space left on device" in error and "step_2 is complete; make room" in error
    assert rows(tmp_path / "run")[-1]["step"] in (4, 5)
    assert names_in(tmp_path / "run") == ["latest", "step_2"]

    # 2. A loss that ends all ranks while one still writes: the checkpoint is completed, and not proven.
    by_time = [*command, "checkpoint.interval=1s"]
    (error, step), *others = run_ranks(fit_to_an_error, 2, by_time, "not finite")
    assert others == [(error, step)] and step > 2
    assert error.startswith(f"TrainingError: step {step + 1}: the loss is nan")
    assert names_in(tmp_path / "run") == sorted(["latest", "step_2", f"step_{step}"])
    assert (tmp_path / "run/checkpoints/latest").read_text() == f"step_{step}\n"
    assert not (tmp_path / f"run/checkpoints/step_{step}/proven").exists()
