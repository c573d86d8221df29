"""Checkpoint folders: what counts as whole, what is never read, and that one is always there."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest

from k25_train.checkpoint import folders
from k25_train.errors import CheckpointError

CONFIG_YAML = "train:\n  seed: 7\n"


class Killed(BaseException):
    """The process ends here."""


def write_checkpoint(root: Path, step: int) -> Path:
    """What the ranks and then rank 0 do."""
    partial = folders.prepare_partial(root, step)
    for name in (".metadata", "__0_0.distcp", "__1_0.distcp"):
        (partial / name).write_bytes(name.encode() * step)
    return folders.publish(root, step, CONFIG_YAML)


def test_a_published_checkpoint_is_whole(tmp_path: Path) -> None:
    folder = write_checkpoint(tmp_path, 3)

    assert folder == tmp_path / "step_3"
    assert folders.verify(folder) == 3
    assert (folder / "config.yaml").read_text() == CONFIG_YAML
    listed = json.loads((folder / "manifest.json").read_text())["file_bytes"]
    assert set(listed) == {".metadata", "__0_0.distcp", "__1_0.distcp", "config.yaml"}


def test_the_newest_is_the_highest_step(tmp_path: Path) -> None:
    assert folders.newest_checkpoint(tmp_path / "absent") is None
    for step in (9, 10, 2):
        write_checkpoint(tmp_path, step)
    (tmp_path / "step_99").write_text("a file, not a checkpoint")
    (tmp_path / "step_x").mkdir()
    assert folders.newest_checkpoint(tmp_path) == tmp_path / "step_10"


def test_a_partial_is_never_resumed_from_and_goes_at_the_next_start(tmp_path: Path) -> None:
    write_checkpoint(tmp_path, 10)
    left_over = folders.prepare_partial(tmp_path, 20)
    (left_over / "__0_0.distcp").write_bytes(b"half")

    assert folders.newest_checkpoint(tmp_path) == tmp_path / "step_10"
    assert folders.start_from(tmp_path) == tmp_path / "step_10"
    assert [path.name for path in tmp_path.iterdir()] == ["step_10"]


def test_a_left_over_of_the_same_step_does_not_get_into_the_next_save(tmp_path: Path) -> None:
    left_over = folders.prepare_partial(tmp_path, 3)
    (left_over / "__7_0.distcp").write_bytes(b"of a larger job")

    folder = write_checkpoint(tmp_path, 3)

    assert not (folder / "__7_0.distcp").exists()


def test_a_complete_checkpoint_is_not_replaced(tmp_path: Path) -> None:
    before = (write_checkpoint(tmp_path, 3) / "__0_0.distcp").stat()

    with pytest.raises(OSError, match="not empty"):
        write_checkpoint(tmp_path, 3)

    assert (tmp_path / "step_3/__0_0.distcp").stat() == before


@pytest.mark.parametrize("name", [".metadata", "__1_0.distcp", "config.yaml"])
def test_a_missing_file_is_named_with_the_remedy(name: str, tmp_path: Path) -> None:
    write_checkpoint(tmp_path, 10)
    folder = write_checkpoint(tmp_path, 20)
    (folder / name).unlink()

    with pytest.raises(CheckpointError) as raised:
        folders.verify(folder)

    assert f"{folder / name} is missing" in str(raised.value)
    assert "delete it to resume from step_10" in str(raised.value)


def test_a_truncated_file_is_named_with_both_sizes(tmp_path: Path) -> None:
    folder = write_checkpoint(tmp_path, 10)
    os.truncate(folder / "__0_0.distcp", 7)

    with pytest.raises(
        CheckpointError, match=r"__0_0\.distcp has 7 bytes instead of 120.* start from scratch"
    ):
        folders.verify(folder)


@pytest.mark.parametrize("text", [None, "", "{", "[1]", '{"step": 10}', '{"format_version": 1, "step": 10}'])
def test_a_missing_or_broken_manifest_is_named(text: str | None, tmp_path: Path) -> None:
    manifest = write_checkpoint(tmp_path, 10) / "manifest.json"
    if text is None:
        manifest.unlink()
    else:
        manifest.write_text(text)

    with pytest.raises(CheckpointError, match=r"manifest\.json: missing or unreadable"):
        folders.verify(manifest.parent)


def test_another_format_is_refused(tmp_path: Path) -> None:
    manifest = write_checkpoint(tmp_path, 10) / "manifest.json"
    manifest.write_text(manifest.read_text().replace('"format_version": 1', '"format_version": 99'))

    with pytest.raises(CheckpointError, match="format 99, but this version reads 1"):
        folders.verify(manifest.parent)


def test_an_absent_checkpoint_is_named_with_those_that_exist(tmp_path: Path) -> None:
    write_checkpoint(tmp_path, 10)

    with pytest.raises(CheckpointError, match=r"step_11: no such checkpoint; .* holds step_10"):
        folders.verify(tmp_path / "step_11")


def test_prune_keeps_the_newest(tmp_path: Path) -> None:
    for step in (2, 9, 10):
        write_checkpoint(tmp_path, step)

    folders.prune(tmp_path, keep=2)

    assert sorted(path.name for path in tmp_path.iterdir()) == ["step_10", "step_9"]


def test_a_kill_at_any_moment_leaves_a_complete_newest_checkpoint(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Saves step 3 over steps 1 and 2 with keep=1, killed before each single change of the file system."""
    num_changes = 0
    while True:
        root = tmp_path / str(num_changes)
        for step in (1, 2):
            write_checkpoint(root, step)
        with monkeypatch.context() as patched:
            kill_after(num_changes, patched)
            try:
                write_checkpoint(root, 3)
                folders.prune(root, keep=1)
                finished = True
            except Killed:
                finished = False
        newest = folders.newest_checkpoint(root)
        assert newest is not None
        assert folders.verify(newest) in (2, 3)
        if finished:
            break
        start = folders.start_from(root)
        assert start == newest
        assert all(folders.verify(folder) for folder in root.iterdir()), "something half-made is left"
        num_changes += 1
    assert folders.verify(newest) == 3
    assert num_changes > 10


def kill_after(num_changes: int, patched: pytest.MonkeyPatch) -> None:
    """Let `num_changes` changes to the file system happen, and end the process at the next."""
    left = [num_changes]

    def guarded(change):  # noqa: ANN001, ANN202
        def call(*args: object, **kwargs: object) -> object:
            if left[0] == 0:
                raise Killed
            left[0] -= 1
            return change(*args, **kwargs)

        return call

    for name in ("mkdir", "rename", "replace", "unlink", "rmdir", "fsync"):
        patched.setattr(os, name, guarded(getattr(os, name)))
