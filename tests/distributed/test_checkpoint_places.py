"""Checkpoints in another folder or an object store: a run saves, prunes, ends, and goes on bitwise."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from pathlib import Path

import pytest

from k25_train.checkpoint import folders
from k25_train.checkpoint.integrity import verify
from k25_train.checkpoint.storage.kinds import Place
from k25_train.checkpoint.storage.places import checkpoints_of
from launch.attempts import Attempts
from launch.status.facts import look
from tests.helpers.interrupted_runs import ONE_RANK, SHORT, rows, short_run
from tests.helpers.ranks import RankContext, run_ranks
from tests.helpers.runs import fit
from tests.helpers.s3_server import KEYS, s3_server

pytestmark = pytest.mark.distributed


def fit_with(context: RankContext, arguments: Sequence[str], environment: Mapping[str, str]) -> None:
    """Train, with further variables."""
    os.environ.update(environment)
    fit(context, arguments)


def trained(run: Path) -> list[tuple[object, ...]]:
    """Step, loss and gradient norm of each row of a run."""
    return [(row["step"], row.get("loss"), row.get("grad_norm")) for row in rows(run)]


def goes_on_there(place: str, data: Path, run: Path, reference: Path, environment: Mapping[str, str]) -> None:
    """A run whose last checkpoint was not completed goes on; supervisor and status know of the others."""
    arguments = [*short_run(data, run, *ONE_RANK), f"checkpoint.dir={place}", "checkpoint.interval=2"]
    run_ranks(fit_with, 1, arguments, environment)
    root, last = checkpoints_of(str(run), place), SHORT.num_steps
    assert [folders.step_of(each) for each in folders.list_checkpoints(root)] == [last - 2, last]
    cut_short(root / f"step_{last}")
    run_ranks(fit_with, 1, arguments, environment)
    assert trained(run) == trained(reference)
    assert [folders.step_of(each) for each in folders.list_checkpoints(root)] == [last - 2, last]
    assert folders.latest_checkpoint(root) == root / f"step_{last}"
    assert verify(root / f"step_{last}").number == last // 2
    assert Attempts(run).saved_step() == last
    status = look(run)
    assert status.checkpoint is not None and status.checkpoint.step == last


def cut_short(checkpoint: Place) -> None:
    """What a kill before the last request of a save leaves."""
    (checkpoint / "manifest.json").unlink()
    if isinstance(checkpoint, Path):
        checkpoint.rename(f"{checkpoint}.partial")


def test_in_another_folder(data: Path, run_alone: Path, tmp_path: Path) -> None:
    place = tmp_path / "scratch/mine"
    goes_on_there(str(place), data, tmp_path / "run", run_alone, {})
    assert (tmp_path / "run/checkpoints").samefile(place)


@pytest.mark.slow
def test_in_an_object_store(
    data: Path, run_alone: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with s3_server() as server:
        server.put("runs", {})
        environment = {**KEYS, "AWS_ENDPOINT_URL": server.url}
        for name, value in environment.items():
            monkeypatch.setenv(name, value)
        # One upload and one answer are lost on the way.
        server.faults.cuts = server.faults.losses = 1
        goes_on_there("s3://runs/mine", data, tmp_path / "run", run_alone, environment)
        assert not server.faults.cuts and not server.faults.losses
