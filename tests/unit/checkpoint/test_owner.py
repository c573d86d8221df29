"""Two runs do not share a place for checkpoints; one that was moved keeps its own."""

import shutil
from pathlib import Path

import pytest
from upath import UPath

from k25_train.checkpoint.owner import OWNER, own
from k25_train.checkpoint.storage.kinds import Place
from k25_train.errors import ConfigError
from k25_train.run_folder.record import LOCK


@pytest.fixture(params=["folder", "store"])
def place(request: pytest.FixtureRequest, tmp_path: Path) -> Place:
    if request.param == "store":
        return UPath(f"memory://{tmp_path.name}/checkpoints")
    (tmp_path / "scratch").mkdir()
    return tmp_path / "scratch"


def run_in(folder: Path) -> Path:
    folder.mkdir()
    return folder


def test_another_run_is_refused_until_the_file_goes(place: Place, tmp_path: Path) -> None:
    first, second = run_in(tmp_path / "first"), run_in(tmp_path / "second")
    own(place, first, is_named=True)
    own(place, first, is_named=True)
    with pytest.raises(ConfigError, match=rf"has the checkpoints of the run in {first}, .*remove .*{OWNER}"):
        own(place, second, is_named=True)
    (place / OWNER).unlink()
    own(place, second, is_named=True)
    with pytest.raises(ConfigError, match=f"the run in {second}"):
        own(place, first, is_named=True)


def test_a_run_that_was_moved_keeps_its_place_but_a_copy_has_none(place: Place, tmp_path: Path) -> None:
    run = run_in(tmp_path / "run")
    own(place, run, is_named=True)
    copy = Path(shutil.copytree(run, tmp_path / "copy"))
    with pytest.raises(ConfigError, match=f"the run in {run}, and run.dir={copy} would"):
        own(place, copy, is_named=True)
    own(place, run.rename(tmp_path / "moved"), is_named=True)


def test_a_place_that_cannot_be_used_is_named(tmp_path: Path) -> None:
    run, place = run_in(tmp_path / "run"), tmp_path / "scratch"
    with pytest.raises(ConfigError, match="scratch/owner can neither be read nor written"):
        own(place, run, is_named=True)
    place.mkdir()
    (place / OWNER).write_bytes(b"\xff")
    with pytest.raises(ConfigError, match="scratch/owner can neither be read nor written"):
        own(place, run, is_named=True)


def test_the_folder_of_another_run_is_refused_from_both_sides(tmp_path: Path) -> None:
    first, second = run_in(tmp_path / "first"), run_in(tmp_path / "second")
    place = run_in(first / "checkpoints")
    own(place, first, is_named=False)
    assert list(place.iterdir()) == []
    (first / LOCK).touch()
    (second / "checkpoints").symlink_to(place)
    with pytest.raises(ConfigError, match=f"is in run.dir={first}, which is in use"):
        own(second / "checkpoints", second, is_named=True)
    (first / LOCK).unlink()
    own(second / "checkpoints", second, is_named=True)
    with pytest.raises(ConfigError, match=f"the run in {second}, and run.dir={first} would"):
        own(place, first, is_named=False)
