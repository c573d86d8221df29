"""Over real ranks: one folder, one writer, and signals that stop a run wherever they arrive."""

import os
import signal
import subprocess
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

from k25_train.errors import K25Error
from k25_train.run_folder import held, location
from k25_train.run_folder.process import this_process
from k25_train.run_folder.record import LOCK, new_holder
from tests.helpers.interrupted_runs import rows, short_run
from tests.helpers.ranks import RankContext, run_ranks
from tests.helpers.runs import fit, layout, start_run

pytestmark = pytest.mark.distributed


def claimed_on_nodes(context: RankContext, arguments: Sequence[str], scene: str, run: str) -> str:
    """The error of a rank that is a node of its own, on a file system as the scene says."""
    location.LOOK_S = 0.5
    if context.rank == 1 and scene in ("not shared", "checkpoints not shared"):
        place = run if scene == "not shared" else f"{run}/checkpoints"
        os.unshare(os.CLONE_NEWNS)
        subprocess.run(["mount", "--make-rprivate", "/"], check=True)
        subprocess.run(["mount", "-t", "tmpfs", "none", place], check=True)
    if context.rank == 1 and scene == "read-only":
        os.unshare(os.CLONE_NEWNS)
        subprocess.run(["mount", "--make-rprivate", "/"], check=True)
        subprocess.run(["mount", "--bind", run, run], check=True)
        subprocess.run(["mount", "-o", "remount,ro,bind", run], check=True)
    nodes = {"LOCAL_RANK": "0", "LOCAL_WORLD_SIZE": "1", "GROUP_RANK": str(context.rank)}
    environment = RankContext.environment

    def with_nodes(self: RankContext) -> dict[str, str]:
        return environment(self) | nodes

    RankContext.environment = with_nodes  # type: ignore[method-assign]
    try:
        start_run(context, arguments)
    except K25Error as error:
        return f"{type(error).__name__}: {error}"
    return ""


@pytest.mark.parametrize(
    ("scene", "expected"),
    [
        ("not shared", "is not one folder that all nodes share:\n  node 1 ("),
        ("read-only", "cannot write there (Read-only file system)"),
        ("checkpoints not shared", "rank 1): checkpoints/: does not see what rank 0 has written there"),
    ],
)
def test_a_folder_that_is_not_one_is_refused(data: Path, tmp_path: Path, scene: str, expected: str) -> None:
    if os.geteuid() != 0:
        pytest.skip("only root can mount")
    run = tmp_path / "run"
    (run / "checkpoints").mkdir(parents=True)
    arguments = short_run(data, run, *layout(ep=2, dp=2))
    errors = run_ranks(claimed_on_nodes, 2, arguments, scene, str(run))
    assert errors[0] == errors[1] and errors[0].startswith("ConfigError: ") and expected in errors[0]
    assert [path.name for path in run.rglob("*")] == ["checkpoints"]


def fit_disturbed(context: RankContext, arguments: Sequence[str], what: str, run: str) -> str:
    """Train, while something happens in the second step; the error."""
    from k25_train.training import trainer

    train_step = trainer.train_step
    held.PAUSE_S = 0.01

    def disturbed(of: Any, step: int) -> Any:
        if step == 2 and what == "SIGINT" and context.rank == 1:
            os.kill(os.getpid(), signal.SIGINT)
        if step == 2 and what == "taken" and context.rank == 0:
            (Path(run) / LOCK).write_text(new_holder(None, this_process()).to_json())
        if step == 2 and what == "deleted" and context.rank == 0:
            Path(run).rename(f"{run}.moved")
        return train_step(of, step)

    trainer.train_step = disturbed
    try:
        fit(context, arguments)
    except K25Error as error:
        return f"{type(error).__name__}: {error}"
    return ""


@pytest.mark.parametrize(
    ("what", "expected"),
    [
        ("taken", "was taken over by process"),
        ("deleted", "was deleted or moved while the run was writing there"),
        ("SIGINT", ""),
    ],
)
def test_what_happens_to_a_run_stops_it(data: Path, tmp_path: Path, what: str, expected: str) -> None:
    """On all ranks, and nothing is written any more."""
    run = tmp_path / "run"
    arguments = short_run(data, run, *layout(ep=2, dp=2), "checkpoint.interval=4")
    errors = run_ranks(fit_disturbed, 2, arguments, what, str(run))
    if what == "SIGINT":
        assert errors == ["", ""]
        assert [folder.name for folder in (run / "checkpoints").glob("step_*")] == ["step_2"]
        assert rows(run)[-1]["step"] == 2
        return
    assert errors[0] == errors[1] and errors[0].startswith("LockedError: ") and expected in errors[0]
    assert not (run / "checkpoints").exists() and not list(tmp_path.glob("run.moved/checkpoints/step_*"))
