"""`checkpoints` of a run folder leads to `checkpoint.dir`, and a run never starts from scratch by mistake."""

from pathlib import Path

import pytest

from k25_train.errors import ConfigError
from k25_train.run_folder.checkpoints import bind, note_steps, url_of


@pytest.fixture
def run(tmp_path: Path) -> Path:
    (tmp_path / "run").mkdir()
    return tmp_path / "run"


def test_a_folder_elsewhere_is_linked_to(run: Path, tmp_path: Path) -> None:
    place = tmp_path / "scratch/mine"
    bind(run, None)
    assert not (run / "checkpoints").exists()
    # One that start-up left, without a checkpoint in it.
    (run / "checkpoints/.startup.x").mkdir(parents=True)
    (run / "checkpoints/.startup.x").rmdir()
    for _ in range(2):
        bind(run, str(place))
    assert (run / "checkpoints").is_symlink() and (run / "checkpoints").samefile(place)
    # What leads there is enough.
    bind(run, None)


def test_a_store_is_noted_with_what_is_in_it(run: Path) -> None:
    for _ in range(2):
        bind(run, "s3://bucket/run/")
    assert url_of(run) == "s3://bucket/run"
    note_steps(run, [5, 10])
    note_steps(run, [10, 15])
    assert sorted(path.name for path in (run / "checkpoints").iterdir()) == ["place", "step_10", "step_15"]


def test_checkpoints_that_are_elsewhere_are_not_forgotten(run: Path, tmp_path: Path) -> None:
    def refused(wanted: str | None, known: str) -> None:
        with pytest.raises(
            ConfigError, match=r"the run would start from scratch\. Set checkpoint\.dir"
        ) as raised:
            bind(run, wanted)
        assert f"checkpoints of this run are in {known}" in str(raised.value)

    (run / "checkpoints/step_5").mkdir(parents=True)
    refused(str(tmp_path / "other"), f"{run}/checkpoints")
    refused("s3://bucket/run", f"{run}/checkpoints")
    # In its own folder, by another name.
    bind(run, str(run / "checkpoints"))
    (run / "checkpoints").rename(tmp_path / "moved")
    bind(run, str(tmp_path / "moved"))
    refused(str(tmp_path / "other"), f"{tmp_path}/moved")
    (tmp_path / "moved").rename(tmp_path / "unmounted")
    refused(str(tmp_path / "other"), f"{tmp_path}/moved")
    (run / "checkpoints").unlink()
    bind(run, "s3://bucket/run")
    for wanted in (None, "s3://bucket/other", str(tmp_path / "other")):
        refused(wanted, "s3://bucket/run")


def test_one_that_cannot_be_made_is_named(run: Path, tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(
        ConfigError, match=r"checkpoint\.dir=.*/file/x: cannot be made.*null for one in the run"
    ):
        bind(run, str(tmp_path / "file/x"))
