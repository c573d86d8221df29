"""A save goes on while its state changes, and holds that of its step; what fails costs only that save."""

import errno
import time
from collections.abc import Iterator
from pathlib import Path
from unittest import mock

import pytest
import torch
from torch import Tensor

from k25_train.checkpoint.files.stored import StoredCheckpoint
from k25_train.checkpoint.files.writer import PartsWriter
from k25_train.checkpoint.manifest import read_manifest
from k25_train.checkpoint.records import Committed
from k25_train.checkpoint.saving import Saving
from k25_train.checkpoint.snapshot import Snapshot, build_snapshot
from k25_train.errors import CheckpointError
from parallel.host.copier import ThreadCopier
from tests.helpers.small_saves import SlowDisk, contents, one_rank, pieces_of


@pytest.fixture(autouse=True)
def job() -> Iterator[None]:
    with one_rank():
        yield


@pytest.fixture
def state() -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(0)
    return {
        "decoder.weight": torch.randn(300, 1000, generator=generator).bfloat16(),
        "optimizer.state.param.decoder.weight": torch.randn(300, 1000, generator=generator),
        "router.expert_bias": torch.randn(8, generator=generator),
        "count": torch.tensor([3]),
    }


@pytest.fixture
def snapshot() -> Iterator[Snapshot]:
    made = build_snapshot(torch.device("cpu"))
    yield made
    made.close()


def finish(saving: Saving, why_unsound: str = "") -> Committed:
    """Wait for both halves."""
    for _ in range(2):
        saving.wait()
        if committed := saving.advance(why_unsound):
            return committed
    raise AssertionError("it is complete after two steps")


def test_training_goes_on_while_a_slow_disk_writes_the_state_of_the_step(
    state: dict[str, Tensor], snapshot: Snapshot, tmp_path: Path
) -> None:
    moment = {name: tensor.clone() for name, tensor in state.items()}
    with SlowDisk()() as disk:
        saving = Saving(tmp_path, contents(5), snapshot, lambda: pieces_of(state), num_writers=3)
        snapshot.wait_to_update()
        for tensor in state.values():
            tensor.add_(1)
        assert saving.is_busy and not saving.has_failed and not saving.is_written
        assert not (tmp_path / "step_5").exists()
        disk.may_go_on.set()
        committed = finish(saving)

    assert committed == Committed(tmp_path / "step_5", "")
    stored = StoredCheckpoint.open(committed.folder)
    for name, tensor in moment.items():
        assert torch.equal(stored.read(name).view(tensor.shape), tensor), name
    manifest = read_manifest(committed.folder)
    files = {name for name in manifest.files if name.endswith(".safetensors")}
    assert len(files) == 3
    assert saving.figures.num_bytes == sum(manifest.files[name].num_bytes for name in files)
    assert saving.figures.write_s > 0


def test_files_do_not_depend_on_when_they_are_written(
    state: dict[str, Tensor], snapshot: Snapshot, tmp_path: Path
) -> None:
    for folder in ("waited", "behind"):
        (tmp_path / folder).mkdir()
        saving = Saving(tmp_path / folder, contents(5), snapshot, lambda: pieces_of(state), num_writers=2)
        if folder == "behind":
            snapshot.wait_to_update()
            for tensor in state.values():
                tensor.mul_(2)
        finish(saving)
    one, other = (
        {path.name: path.read_bytes() for path in (tmp_path / folder / "step_5").iterdir()}
        for folder in ("waited", "behind")
    )
    assert one == other


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_state_that_is_not_finite_is_found_in_the_copy_and_set_aside(
    value: float, state: dict[str, Tensor], snapshot: Snapshot, tmp_path: Path
) -> None:
    state["decoder.weight"][299, 999] = value
    saving = Saving(tmp_path, contents(5), snapshot, lambda: pieces_of(state), num_writers=2)
    committed = finish(saving)
    assert committed == Committed(tmp_path / "step_5.unsound", "decoder.weight is not finite")
    assert read_manifest(committed.folder).why_unsound == "decoder.weight is not finite"


def test_what_is_learnt_before_all_is_written_counts(
    state: dict[str, Tensor], snapshot: Snapshot, tmp_path: Path
) -> None:
    saving = Saving(tmp_path, contents(5, "a"), snapshot, lambda: pieces_of(state), num_writers=1)
    assert finish(saving, "b") == Committed(tmp_path / "step_5.unsound", "a; b")


def test_a_file_that_fails_names_rank_file_cause_and_remedy_and_leaves_earlier_checkpoints(
    state: dict[str, Tensor], snapshot: Snapshot, tmp_path: Path
) -> None:
    earlier = finish(Saving(tmp_path, contents(4), snapshot, lambda: pieces_of(state), num_writers=1)).folder
    before = {path: path.read_bytes() for path in earlier.iterdir()}
    write = PartsWriter.write

    def full(self: PartsWriter, piece: Tensor) -> None:
        if "_1." in str(self._path):
            raise OSError(errno.ENOSPC, "No space left on device")
        write(self, piece)

    with mock.patch.object(PartsWriter, "write", full):
        saving = Saving(tmp_path, contents(5), snapshot, lambda: pieces_of(state), num_writers=2)
        saving.wait()
        assert saving.has_failed
        with pytest.raises(CheckpointError) as failed:
            saving.advance(gives_up=True)

    partial = tmp_path / "step_5.partial"
    told = f"rank 0: [Errno 28] No space left on device: '{partial}/rank_00000_1.safetensors'"
    assert str(failed.value).startswith(f"{partial}: could not be written ({told})")
    assert f"{earlier} is complete; make room, or move the run folder" in str(failed.value)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["latest", "step_4"]
    assert {path: path.read_bytes() for path in earlier.iterdir()} == before


def test_a_commit_that_fails_leaves_nothing_behind(
    state: dict[str, Tensor], snapshot: Snapshot, tmp_path: Path
) -> None:
    with mock.patch("k25_train.checkpoint.saving.publish", side_effect=OSError(errno.EROFS, "Read-only")):
        saving = Saving(tmp_path, contents(5), snapshot, lambda: pieces_of(state), num_writers=2)
        with pytest.raises(CheckpointError, match=r"step_5.partial: could not be written \(.*Read-only"):
            finish(saving)
    assert list(tmp_path.iterdir()) == []


def test_another_ranks_failure_ends_the_writing_of_this_one(
    state: dict[str, Tensor], snapshot: Snapshot, tmp_path: Path
) -> None:
    """Told by the agreement of the step; its own threads end without an error of their own."""
    with SlowDisk()() as disk:
        saving = Saving(tmp_path, contents(5), snapshot, lambda: pieces_of(state), num_writers=2)
        saving._is_cancelled.set()
        disk.may_go_on.set()
        saving.wait()
        assert saving._written() == []


def test_a_folder_that_is_not_there_fails_at_the_start(
    state: dict[str, Tensor], snapshot: Snapshot, tmp_path: Path
) -> None:
    with (
        mock.patch("k25_train.checkpoint.folders.prepare_partial", lambda root, step: root / "elsewhere"),
        pytest.raises(CheckpointError, match=r"elsewhere is not there: .* in a folder that all nodes share"),
    ):
        Saving(tmp_path, contents(5), snapshot, lambda: pieces_of(state), num_writers=2)


def test_a_save_that_cannot_start_leaves_the_checkpoint_of_its_step(
    state: dict[str, Tensor], snapshot: Snapshot, tmp_path: Path
) -> None:
    """Nothing of it is there yet, so that nothing has to go."""
    there = finish(Saving(tmp_path, contents(5), snapshot, lambda: pieces_of(state), num_writers=1)).folder
    before = {path: path.read_bytes() for path in there.iterdir()}
    full = OSError(errno.ENOSPC, "No space left on device")
    with (
        mock.patch("k25_train.checkpoint.folders.prepare_partial", side_effect=full),
        pytest.raises(CheckpointError, match="make room"),
    ):
        Saving(tmp_path, contents(5), snapshot, lambda: pieces_of(state), num_writers=1)
    assert {path: path.read_bytes() for path in there.iterdir()} == before


def test_what_is_held_back_gets_its_name_when_the_save_goes_on(
    state: dict[str, Tensor], snapshot: Snapshot, tmp_path: Path
) -> None:
    """The row of a step is written in between."""
    saving = Saving(tmp_path, contents(5), snapshot, lambda: pieces_of(state), num_writers=2)
    saving.wait()
    assert saving.advance(holds_back=True) is None and saving.is_written
    time.sleep(0.1)
    assert saving.is_busy and not (tmp_path / "step_5").exists()
    saving.wait()
    assert saving.advance() == Committed(tmp_path / "step_5", "")


def test_a_failure_is_told_where_the_folder_cannot_be_listed(
    state: dict[str, Tensor], snapshot: Snapshot, tmp_path: Path
) -> None:
    broken = OSError(errno.EIO, "Input/output error")
    with (
        mock.patch("k25_train.checkpoint.saving.publish", side_effect=broken),
        mock.patch("k25_train.checkpoint.folders.newest_checkpoint", side_effect=broken),
        pytest.raises(CheckpointError, match="which earlier checkpoints are there cannot be read"),
    ):
        finish(Saving(tmp_path, contents(5), snapshot, lambda: pieces_of(state), num_writers=1))
    assert list(tmp_path.iterdir()) == []


def test_a_slow_copy_is_waited_for_before_it_is_written(state: dict[str, Tensor], tmp_path: Path) -> None:
    copier = ThreadCopier(delay_s=lambda: 0.05)
    snapshot = Snapshot(copier, copier)
    moment = {name: tensor.clone() for name, tensor in state.items()}
    committed = finish(Saving(tmp_path, contents(5), snapshot, lambda: pieces_of(state), num_writers=2))
    stored = StoredCheckpoint.open(committed.folder)
    for name, tensor in moment.items():
        assert torch.equal(stored.read(name).view(tensor.shape), tensor), name
    snapshot.close()


def test_a_save_that_is_abandoned_writes_no_more(
    state: dict[str, Tensor], snapshot: Snapshot, tmp_path: Path
) -> None:
    with SlowDisk()() as disk:
        saving = Saving(tmp_path, contents(5), snapshot, lambda: pieces_of(state), num_writers=2)
        saving.abandon()
        disk.may_go_on.set()
        saving.wait()
    assert saving._written() == []
    assert [path.name for path in tmp_path.iterdir()] == ["step_5.partial"]
