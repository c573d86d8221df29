"""Checkpoint folders: what counts, what is never read, what may go, and that a good one is always there."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

import pytest

from k25_train.checkpoint import folders, publish
from k25_train.checkpoint.integrity import verify
from k25_train.checkpoint.manifest import FileEntry, Manifest
from k25_train.checkpoint.storage.places import POSIX
from k25_train.errors import CheckpointError
from tests.helpers.written_checkpoints import fill_partial, write_checkpoint


class Killed(BaseException):
    """The process ends here."""


def names(root: Path) -> list[str]:
    return sorted(path.name for path in root.iterdir() if path.name != folders.LATEST)


def test_the_newest_is_the_highest_step(tmp_path: Path) -> None:
    assert folders.newest_checkpoint(tmp_path / "absent") is None
    for step in (9, 10, 2):
        write_checkpoint(tmp_path, step)
    (tmp_path / "step_99").write_text("a file, not a checkpoint")
    for name in ("step_x", "step_0123", "step_12.damaged", "step_²"):
        (tmp_path / name).mkdir()
    assert folders.newest_checkpoint(tmp_path) == tmp_path / "step_10"
    assert folders.newest_checkpoint(tmp_path) == tmp_path / "step_10"


def test_a_partial_is_never_resumed_from_and_goes_at_the_next_start(tmp_path: Path) -> None:
    write_checkpoint(tmp_path, 10)
    (folders.prepare_partial(tmp_path, 20) / "__0_0.distcp").write_bytes(b"half")
    (tmp_path / "step_14.unsound.partial").mkdir()
    (tmp_path / "step_30.partial").write_text("a file")
    (tmp_path / "step_31.partial").symlink_to(tmp_path / "nowhere")
    (tmp_path / "notes.partial").mkdir()

    assert folders.newest_checkpoint(tmp_path) == tmp_path / "step_10"
    assert folders.start_from(tmp_path) == tmp_path / "step_10"
    assert names(tmp_path) == ["notes.partial", "step_10"]


def test_a_left_over_of_the_same_step_does_not_get_into_the_next_save(tmp_path: Path) -> None:
    (folders.prepare_partial(tmp_path, 3) / "__7_0.distcp").write_bytes(b"of a larger job")

    assert not (write_checkpoint(tmp_path, 3) / "__7_0.distcp").exists()


def test_prune_keeps_the_newest(tmp_path: Path) -> None:
    for step in (2, 9, 10):
        write_checkpoint(tmp_path, step)

    folders.prune(tmp_path, keep=2)

    assert names(tmp_path) == ["step_10", "step_9"]


def test_every_nth_stays_for_ever_whatever_was_pruned_before(tmp_path: Path) -> None:
    for step in range(10, 80, 10):
        write_checkpoint(tmp_path, step)
        folders.prune(tmp_path, keep=1, keep_every=3)

    assert names(tmp_path) == ["step_30", "step_60", "step_70"]
    # An unreadable manifest does not start the count again.
    (tmp_path / "step_70/manifest.json").write_text("{")
    assert verify(write_checkpoint(tmp_path, 80)).number == 7
    folders.prune(tmp_path, keep=1)
    assert names(tmp_path) == ["step_70", "step_80"]


def test_latest_names_the_newest_that_is_sound_and_whole(tmp_path: Path) -> None:
    assert folders.latest_checkpoint(tmp_path) is None
    for step in (1, 2, 3):
        assert folders.latest_checkpoint(write_checkpoint(tmp_path, step).parent) == tmp_path / f"step_{step}"
    write_checkpoint(tmp_path, 4, why_unsound="its loss was 30")
    folders.set_aside(tmp_path, 3, "its weights are bad")
    assert folders.latest_checkpoint(tmp_path) == tmp_path / "step_2"
    # Whoever moves or breaks one by hand: the next start looks again.
    os.truncate(tmp_path / "step_2/__0_0.distcp", 3)
    folders.start_from(tmp_path)
    assert folders.latest_checkpoint(tmp_path) == tmp_path / "step_1"
    (tmp_path / "latest").write_text("../elsewhere")
    with pytest.raises(CheckpointError, match=r"latest names '\.\./elsewhere', which is no checkpoint"):
        folders.latest_checkpoint(tmp_path)
    shutil.rmtree(tmp_path / "step_1")
    folders.start_from(tmp_path)
    assert not (tmp_path / "latest").exists()


def test_of_two_savers_of_a_step_only_one_gets_the_name(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(publish, "PATIENCE_S", 0.0)
    write_checkpoint(tmp_path, 1)
    partial = fill_partial(tmp_path, 3)
    with (partial / "__0_0.distcp").open("ab") as still_open:
        second = write_checkpoint(tmp_path, 3)
        still_open.write(b"of a rank that does not know")
    before = {path.name: path.read_bytes() for path in second.iterdir()}

    manifest = Manifest(step=3, files={"__0_0.distcp": FileEntry(1, "")}, facts={})
    with pytest.raises(CheckpointError, match="the first rank does not see it"):
        publish.publish(tmp_path, partial, manifest, {})
    with pytest.raises(CheckpointError, match="step_3 is there already, and stays"):
        write_checkpoint(tmp_path, 3)

    assert {path.name: path.read_bytes() for path in second.iterdir()} == before
    assert verify(second).step == 3
    # Texts are created, never truncated, as the files of the ranks are.
    with pytest.raises(FileExistsError):
        POSIX.write(second / "config.yaml", "")


def test_unsound_ones_neither_count_nor_are_resumed_from(tmp_path: Path) -> None:
    for step in (1, 2):
        write_checkpoint(tmp_path, step)
    for step in (3, 14, 25):
        write_checkpoint(tmp_path, step, why_unsound="its gradient was not finite")
    # By another name it stays what it says it is.
    (tmp_path / "step_25.unsound").rename(tmp_path / "step_25")

    folders.prune(tmp_path, keep=1)
    folders.prune_unsound(tmp_path, keep=2)

    assert names(tmp_path) == ["step_14.unsound", "step_2", "step_25"]
    assert folders.newest_checkpoint(tmp_path) == tmp_path / "step_2"
    assert folders.start_from(tmp_path) == tmp_path / "step_2"
    assert folders.start_from(tmp_path, accept_unsound=True) == tmp_path / "step_25"


def test_a_run_with_unsound_ones_alone_asks_what_to_do(tmp_path: Path) -> None:
    write_checkpoint(tmp_path, 3, why_unsound="its gradient was not finite")

    with pytest.raises(CheckpointError) as raised:
        folders.start_from(tmp_path)

    assert "no sound checkpoint to resume from, only step_3.unsound (its gradient was not" in str(
        raised.value
    )
    assert "another run.dir" in str(raised.value)
    assert "checkpoint.accept_unsound=true" in str(raised.value)


def test_one_that_turns_out_to_be_ruined_is_set_aside_unless_it_is_proven(tmp_path: Path) -> None:
    for step in (2, 3):
        write_checkpoint(tmp_path, step)
    folders.mark_proven(tmp_path, 2)

    for step in (2, 3, 4):
        folders.set_aside(tmp_path, step, "its weights are bad")

    assert names(tmp_path) == ["step_2", "step_3.unsound"]
    aside = verify(tmp_path / "step_3.unsound")
    assert (aside.why_unsound, aside.has_checksums) == ("its weights are bad", True)
    assert folders.newest_checkpoint(tmp_path) == tmp_path / "step_2"
    # The run comes by again, and again.
    write_checkpoint(tmp_path, 3)
    folders.set_aside(tmp_path, 3, "its weights are bad again")
    assert verify(tmp_path / "step_3.unsound").why_unsound == "its weights are bad again"


@pytest.mark.parametrize("damage", ["no manifest", "cut"])
def test_a_damaged_one_neither_counts_nor_is_deleted(damage: str, tmp_path: Path) -> None:
    for step in (1, 2, 3):
        write_checkpoint(tmp_path, step)
    if damage == "cut":
        os.truncate(tmp_path / "step_2/__0_0.distcp", 3)
    else:
        (tmp_path / "step_2/manifest.json").unlink()

    folders.prune(tmp_path, keep=2)

    assert names(tmp_path) == ["step_1", "step_2", "step_3"]


def test_a_checkpoint_that_is_a_link_goes_and_comes_without_its_target(tmp_path: Path) -> None:
    elsewhere, root = tmp_path / "elsewhere", tmp_path / "run"
    for step in (1, 2, 3):
        write_checkpoint(root, step)
    for name in ("step_1", "step_2"):
        shutil.move(root / name, elsewhere / name)
        (root / name).symlink_to(elsewhere / name)

    folders.prune(root, keep=2)

    assert names(root) == ["step_2", "step_3"]
    assert verify(elsewhere / "step_1").step == 1
    assert not write_checkpoint(root, 1).is_symlink()
    # Set aside, it is still a link.
    aside = folders.set_aside(root, 2, "its weights are bad")
    assert aside is not None
    assert aside.is_symlink()
    assert (elsewhere / "step_2/.metadata").exists()


def test_links_that_lead_nowhere(tmp_path: Path) -> None:
    write_checkpoint(tmp_path, 5)
    (tmp_path / "step_4").symlink_to(tmp_path / "gone")
    assert folders.start_from(tmp_path) == tmp_path / "step_5"
    folders.prune(tmp_path, keep=1)
    assert not write_checkpoint(tmp_path, 4).is_symlink()

    (tmp_path / "step_6").symlink_to(tmp_path / "unmounted")
    with pytest.raises(CheckpointError) as raised:
        folders.start_from(tmp_path)
    assert f"step_6 is a link to {tmp_path}/unmounted, where no folder is" in str(raised.value)
    assert "remove the link to resume from step_5" in str(raised.value)


@pytest.mark.parametrize("kind", ["link", "link to nothing", "file"])
def test_a_partial_of_another_kind_is_replaced_without_its_target(kind: str, tmp_path: Path) -> None:
    target, partial = tmp_path / "target", tmp_path / "run/step_3.partial"
    partial.parent.mkdir()
    if kind == "file":
        partial.touch()
    else:
        partial.symlink_to(target)
    if kind == "link":
        target.mkdir()
        (target / "kept").touch()

    write_checkpoint(tmp_path / "run", 3)

    assert names(tmp_path / "run") == ["step_3"]
    assert kind != "link" or names(target) == ["kept"]


def test_a_folder_of_checkpoints_that_is_a_link(tmp_path: Path) -> None:
    (tmp_path / "elsewhere").mkdir()
    root = tmp_path / "checkpoints"
    root.symlink_to(tmp_path / "elsewhere")
    for step in (1, 2):
        write_checkpoint(root, step)

    folders.prune(root, keep=1)

    assert names(tmp_path / "elsewhere") == ["step_2"]
    assert folders.start_from(root) == root / "step_2"


def test_a_kill_at_any_moment_leaves_a_complete_newest_checkpoint(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Saves 3 over 1 and 2 with keep=1, sets it aside and saves it again, killed before each single change
    of the file system."""
    num_changes, before = 0, tmp_path / "before"
    for step in (1, 2):
        write_checkpoint(before, step)
    folders.mark_proven(before, 2)
    while True:
        root = shutil.copytree(before, tmp_path / str(num_changes))
        with monkeypatch.context() as patched:
            kill_after(num_changes, patched)
            try:
                write_checkpoint(root, 3)
                folders.set_aside(root, 3, "bad")
                write_checkpoint(root, 3)
                folders.prune(root, keep=1)
                folders.prune_unsound(root, keep=0)
                finished = True
            except Killed:
                finished = False
        newest = folders.newest_checkpoint(root)
        assert newest is not None
        assert verify(newest).step in (2, 3)
        start = folders.start_from(root)
        assert start == newest
        assert folders.latest_checkpoint(root) == newest
        assert all(verify(root / name) for name in names(root)), "something half-made is left"
        if finished:
            break
        num_changes += 1
    assert names(root) == ["step_3"]
    assert num_changes > 30


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

    for name in ("mkdir", "rename", "replace", "unlink", "rmdir"):
        patched.setattr(os, name, guarded(getattr(os, name)))
