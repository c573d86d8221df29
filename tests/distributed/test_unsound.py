"""A broken state never replaces a good one: a slip in the rate, skipped steps, infinite moments."""

import os
import signal
from collections.abc import Mapping, Sequence
from contextlib import redirect_stdout
from io import StringIO
from pathlib import Path
from typing import Any

import pytest

from k25_train.checkpoint.folders import newest_checkpoint
from k25_train.checkpoint.integrity import verify
from tests.helpers.interrupted_runs import ONE_RANK, rows
from tests.helpers.ranks import RankContext, run_ranks
from tests.helpers.runs import layout, overrides, start_run

pytestmark = pytest.mark.distributed

SMALL = (
    "train.global_batch_size=4", "train.eval_sequences=4", "train.eval_interval=100", "optim.warmup=0",
    "optim.decay=0", "optim.max_skipped_steps=2",
)  # fmt: skip


def fit_through(
    context: RankContext, arguments: Sequence[str], troubles: Mapping[int, str]
) -> tuple[str, str]:
    """Train with trouble in some steps: a spoilt gradient, a signal, both, or an infinite moment afterwards.

    Returns what ended the run, and what was printed.
    """
    from k25_train.errors import K25Error
    from k25_train.metrics.report import Report
    from k25_train.training import trainer

    run = start_run(context, arguments)
    norm, real_step, now, printed = run.optimizer.get_grad_norm, trainer.train_step, [0], StringIO()

    def spoilt_norm() -> float:
        if "skip" in troubles.get(now[0], ""):
            next(iter(run.modules[0].parameters())).main_grad.fill_(float("nan"))
        return norm()

    def troubled_step(run: Any, step: int) -> object:
        now[0] = step
        result = real_step(run, step)
        if "stop" in troubles.get(step, ""):
            os.kill(os.getpid(), signal.SIGTERM)
        if "moment" in troubles.get(step, ""):
            state = next(iter(run.optimizer.chained_optimizers[0].optimizer.state.values()))
            next(value for value in state.values() if value.numel() > 1).fill_(float("inf"))
        return result

    run.optimizer.get_grad_norm, trainer.train_step = spoilt_norm, troubled_step
    ended = "finished"
    with redirect_stdout(printed), Report(run.config, is_main=run.is_main, device_name="CPU") as report:
        try:
            trainer.Trainer(run, report).fit()
        except K25Error as error:
            ended = f"{type(error).__name__}: {error}"
        finally:
            trainer.train_step = real_step
            run.data.close()
    return ended, printed.getvalue()


def left(run: Path) -> list[str]:
    return sorted(path.name for path in (run / "checkpoints").glob("step_*"))


@pytest.mark.parametrize("slip", ["1e4", pytest.param("5.0", marks=pytest.mark.slow)])
def test_a_slip_in_the_rate_costs_nothing_but_the_time(slip: str, data: Path, tmp_path: Path) -> None:
    """A good checkpoint, a slip that ruins the weights in steps that still look sound, two restarts, and the
    rate as it was; with an interval of 1 and one checkpoint that is kept."""
    run = tmp_path / "run"
    command = overrides(
        data, run, *ONE_RANK, *SMALL, "checkpoint.interval=1", "checkpoint.keep=1", "train.eval_sequences=2"
    )
    run_ranks(fit_through, 1, [*command, "train.steps=3"], {})
    assert left(run) == ["step_3"]
    before = verify(run / "checkpoints/step_3")

    for _ in range(2):
        ((ended, printed),) = run_ranks(fit_through, 1, [*command, "train.steps=7", f"optim.lr={slip}"], {})
        if slip == "1e4":
            assert ended.startswith("TrainingError: step 7: 3 gradients in a row were not finite")
            assert f"The last sound checkpoint is {run}/checkpoints/step_3: lower optim.lr" in ended
        else:
            assert "is not sound: " in printed
        assert newest_checkpoint(run / "checkpoints") == run / "checkpoints/step_3"
        assert verify(run / "checkpoints/step_3") == before
        assert len(left(run)) <= 3

    ((ended, printed),) = run_ranks(fit_through, 1, [*command, "train.steps=7"], {})
    assert ended == "finished"
    assert "resuming after step 3 of 7" in printed
    assert newest_checkpoint(run / "checkpoints") == run / "checkpoints/step_7"
    assert rows(run)[-1]["loss"] < 7


def test_what_falls_on_a_skipped_step_waits_for_a_sound_one(data: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    command = overrides(data, run, *layout(dp=2), *SMALL, "checkpoint.interval=2", "train.steps=12")

    # 1. A save that is due, and a signal.
    by_rank = run_ranks(fit_through, 2, command, {2: "skip", 4: "skip stop"})
    assert all(ended == "finished" for ended, _ in by_rank)
    assert left(run) == ["step_3", "step_5"]
    assert "SIGTERM: checkpoint of step 5 saved" in by_rank[0][1]

    # 2. No sound one comes in time: the run stops all the same, and goes on from the last one.
    by_rank = run_ranks(fit_through, 2, command, {6: "skip stop", 7: "skip"})
    assert left(run) == ["step_3", "step_5", "step_7.unsound"]
    assert (
        f"SIGTERM: step 7 is not sound; the same command goes on from {run}/checkpoints/step_5"
        in (by_rank[0][1])
    )
    assert verify(run / "checkpoints/step_7.unsound").why_unsound.startswith("its gradient was not finite")

    # 3. An infinite moment, at finite weights and losses.
    by_rank = run_ranks(fit_through, 2, command, {8: "moment"})
    assert "resuming after step 5 of 12" in by_rank[0][1]
    assert "step 8 is not sound: " in by_rank[0][1]
    assert "is not finite; set aside as" in by_rank[0][1]
    assert newest_checkpoint(run / "checkpoints") == run / "checkpoints/step_6"

    # 4. A last step that is skipped leaves no result, so it is no success.
    by_rank = run_ranks(fit_through, 2, command, {12: "skip"})
    for ended, _ in by_rank:
        assert ended.startswith("TrainingError: step 12, the last one, is not sound")
        assert f"goes on from {run}/checkpoints/step_10" in ended
    assert "step_12.unsound" in left(run)


@pytest.mark.slow
def test_a_run_without_a_sound_checkpoint_goes_on_from_an_unsound_one_if_told_to(
    data: Path, tmp_path: Path
) -> None:
    run = tmp_path / "run"
    command = overrides(data, run, *ONE_RANK, *SMALL, "checkpoint.interval=100", "train.steps=8")
    ((ended, _),) = run_ranks(fit_through, 1, command, {3: "skip", 4: "skip", 5: "skip"})
    assert "There is no sound checkpoint" in ended
    assert left(run) == ["step_5.unsound"]

    ((ended, _),) = run_ranks(fit_through, 1, command, {})
    assert ended.startswith(f"CheckpointError: {run}/checkpoints holds no sound checkpoint to resume from")
    ((ended, printed),) = run_ranks(fit_through, 1, [*command, "checkpoint.accept_unsound=true"], {})
    assert ended == "finished"
    assert f"{run}/checkpoints/step_5.unsound is unsound: its gradient was not finite" in printed
    assert newest_checkpoint(run / "checkpoints") == run / "checkpoints/step_8"
