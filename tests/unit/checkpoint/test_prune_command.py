"""`k25-checkpoint prune`: what it would delete, what it deletes, and when it refuses."""

import json
import os
import shutil
from pathlib import Path

import pytest

from k25_train.checkpoint import folders
from k25_train.checkpoint.__main__ import main
from k25_train.compose.resolve import compose, to_yaml
from k25_train.run_folder.process import this_process
from k25_train.run_folder.record import LOCK, new_holder
from tests.helpers.written_checkpoints import write_checkpoint

SETTINGS = ("experiment=smoke", "checkpoint.keep=2", "checkpoint.keep_every=3")


@pytest.fixture
def run(tmp_path: Path) -> Path:
    """A run with sound checkpoints of steps 1 to 5, and one each damaged, unsound and interrupted."""
    run = tmp_path / "run"
    root = run / "checkpoints"
    root.mkdir(parents=True)
    for step in (1, 2, 3, 4, 5, 6):
        write_checkpoint(root, step)
    next((root / "step_6").glob("__0_0*")).unlink()
    write_checkpoint(root, 7, why_unsound="loss is NaN")
    (root / "step_8.partial").mkdir()
    (run / "config.yaml").write_text(to_yaml(compose(list(SETTINGS))), encoding="utf-8")
    return run


def names(run: Path) -> list[str]:
    return sorted(path.name for path in (run / "checkpoints").iterdir() if path.name != folders.LATEST)


def going(capsys: pytest.CaptureFixture[str], *arguments: object) -> list[str]:
    assert main(["prune", *map(str, arguments), "--json"]) == 0, capsys.readouterr().err
    found = json.loads(capsys.readouterr().out)["checkpoints"]
    return [each["name"] for each in found if each["goes"]]


def test_a_dry_run_shows_what_the_run_itself_would_keep(
    run: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    before = names(run)
    assert going(capsys, run) == ["step_1", "step_2", "step_8.partial"]
    assert going(capsys, run / "checkpoints", "--dry-run") == ["step_1", "step_2", "step_8.partial"]
    assert going(capsys, run, "--keep", 1, "--keep-every", 0) == [
        *(f"step_{step}" for step in (1, 2, 3, 4)),
        "step_8.partial",
    ]
    assert main(["prune", str(run)]) == 0
    assert "would be deleted: give --yes to do it" in capsys.readouterr().out
    assert names(run) == before


def test_yes_deletes_just_that(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["prune", str(run), "--yes", "--also", "step_6"]) == 0
    assert "deleted 4 of 8" in capsys.readouterr().out
    assert names(run) == ["step_3", "step_4", "step_5", "step_7.unsound"]
    assert (run / "checkpoints" / folders.LATEST).read_text().strip() == "step_5"
    assert not (run / LOCK).exists()


def test_it_keeps_what_the_run_keeps(run: Path, tmp_path: Path) -> None:
    own = Path(shutil.copytree(run, tmp_path / "own"))
    for keep, keep_every in ((2, 3), (1, 2), (3, 0), (1, 1)):
        folders.prune(own / "checkpoints", keep, keep_every)
        limits = ["--keep", str(keep), "--keep-every", str(keep_every)]
        assert main(["prune", str(run), "--yes", *limits]) == 0
        assert names(run) == [name for name in names(own) if not name.endswith(".partial")]


def test_the_last_sound_one_stays_whatever_is_given(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["prune", str(run), "--yes", "--keep", "1", "--keep-every", "0"]) == 0
    assert names(run) == ["step_5", "step_6", "step_7.unsound"]
    capsys.readouterr()
    for arguments, words in (
        (["--also", "step_5"], "--also step_5: is sound, and is not deleted by name"),
        (["--also", "step_9"], "--also step_9: "),
        (["--keep", "0"], "--keep: must be at least 1"),
        (["--keep-every", "-1"], "--keep-every: must be at least 0"),
    ):
        assert main(["prune", str(run), *arguments]) == 2
        assert words in capsys.readouterr().err
    assert names(run) == ["step_5", "step_6", "step_7.unsound"]


def test_nothing_is_deleted_while_a_run_holds_the_folder(
    run: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    before = names(run)
    child = os.fork()
    if child == 0:
        (run / LOCK).write_text(new_holder(None, this_process()).to_json())
        os.kill(os.getpid(), 19)  # stopped, and so alive
        os._exit(0)
    try:
        os.waitpid(child, os.WUNTRACED)
        assert main(["prune", str(run), "--yes"]) == 2
        assert f"run.dir={run} is in use by process {child}" in capsys.readouterr().err
        assert names(run) == before
        assert going(capsys, run) == ["step_1", "step_2", "step_8.partial"]
    finally:
        os.kill(child, 9)
        os.waitpid(child, 0)
    # It has ended without releasing the folder.
    assert main(["prune", str(run), "--yes"]) == 0


def test_checkpoints_of_a_run_that_is_not_here(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    for step in (1, 2):
        write_checkpoint(elsewhere, step)
    assert main(["prune", str(elsewhere)]) == 2
    assert "--keep: must be given" in capsys.readouterr().err
    assert main(["prune", str(elsewhere), "--keep", "1", "--yes"]) == 2
    assert "give --not-in-use as well" in capsys.readouterr().err
    assert main(["prune", str(elsewhere), "--keep", "1", "--yes", "--not-in-use"]) == 0
    assert [path.name for path in folders.list_checkpoints(elsewhere)] == ["step_2"]
    assert main(["prune", str(tmp_path)]) == 2
    assert "holds no checkpoints" in capsys.readouterr().err
