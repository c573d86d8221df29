"""Checkpoints in an object store: whole, or not there; two savers, lost connections, deletions cut short."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch

from k25_train.checkpoint import folders, publish
from k25_train.checkpoint.files.parts import Part
from k25_train.checkpoint.files.stored import StoredCheckpoint
from k25_train.checkpoint.files.writer import write_rank
from k25_train.checkpoint.integrity import verify
from k25_train.checkpoint.manifest import Manifest, read_manifest
from k25_train.checkpoint.storage.places import place_of, storage_of
from k25_train.errors import CheckpointError, ConfigError, DamagedCheckpointError
from tests.helpers.s3_server import KEYS, S3, s3_server

SIZE = 300_000
BUCKET = "runs"


@pytest.fixture(scope="module")
def server() -> Iterator[S3]:
    with s3_server() as found:
        found.put(BUCKET, {})
        yield found


@pytest.fixture
def root(server: S3, monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest) -> Any:
    """A prefix of its own in the store."""
    for name, value in KEYS.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setenv("AWS_ENDPOINT_URL", server.url)
    return place_of(f"s3://{BUCKET}/{request.node.name.replace('[', '-').rstrip(']')}")


def content(step: int) -> torch.Tensor:
    return torch.arange(SIZE, dtype=torch.float32) * step


def written(root: Any, step: int) -> tuple[Any, Manifest]:
    """What two ranks have written of a step, which nothing speaks for yet."""
    partial = folders.prepare_partial(root, step)
    return partial, fill(partial, step, content(step))


def fill(partial: Any, step: int, tensor: torch.Tensor) -> Manifest:
    """What two ranks write."""
    part = Part("weight", torch.float32, (SIZE,), 0, SIZE)
    halves = [(0, SIZE // 2), (SIZE // 2, SIZE)]
    files: dict[str, Any] = {}
    for rank, (start, stop) in enumerate(halves):
        files |= write_rank(partial, rank, [(part.cut(start, stop), tensor[start:stop])], 1)
    return Manifest(step=step, files=files, facts={})


def save(root: Any, step: int, why_unsound: str = "") -> Any:
    partial, manifest = written(root, step)
    manifest = Manifest(step=step, files=manifest.files, facts={}, why_unsound=why_unsound)
    return publish.publish(root, partial, manifest, {folders.CONFIG: "train: {}\n"})


def keys(root: Any) -> list[str]:
    found = root.fs.find(root.path)
    return sorted(each.removeprefix(f"{root.path}/") for each in found)


def test_one_is_saved_read_and_pruned(root: Any) -> None:
    for step in (1, 2, 3):
        folder = save(root, step)
    assert folders.newest_checkpoint(root) == folders.latest_checkpoint(root) == folder
    assert verify(folder).number == 3
    assert torch.equal(StoredCheckpoint.open(folder).read("weight"), content(3))

    folders.mark_proven(root, 3)
    folders.prune(root, keep=1, keep_every=2)

    assert [each.name for each in folders.list_checkpoints(root)] == ["step_2", "step_3"]
    assert not any(key.startswith("step_1/") for key in keys(root))
    # A run of another process sees the same.
    assert folders.start_from(place_of(str(root))) == folder


@pytest.mark.slow
def test_an_unsound_one_is_kept_and_passed_over_and_makes_way(root: Any) -> None:
    save(root, 1)
    save(root, 2)
    assert folders.set_aside(root, 2, "its weights are bad") == root / "step_2"
    save(root, 3, why_unsound="its loss was 30")

    assert folders.newest_checkpoint(root) == folders.latest_checkpoint(root) == root / "step_1"
    assert [each.name for each in folders.unsound_checkpoints(root)] == ["step_2", "step_3"]
    folders.prune_unsound(root, keep=1)
    assert verify(save(root, 3)).is_sound
    assert sum(key.startswith("step_3/") for key in keys(root)) == 4
    assert torch.equal(StoredCheckpoint.open(root / "step_3").read("weight"), content(3))


def test_what_was_not_completed_is_told_apart_and_goes(root: Any) -> None:
    save(root, 1)
    written(root, 2)
    with pytest.raises(CheckpointError, match=r"step_2: no such checkpoint, or one that was never completed"):
        verify(root / "step_2")
    # A deletion that was ended behind its first request.
    save(root, 3)
    root.fs.rm_file((root / "step_3/manifest.json").path)

    assert folders.newest_checkpoint(root) == root / "step_1"
    assert folders.start_from(root) == root / "step_1"
    assert {key.split("/")[0] for key in keys(root)} == {"step_1", "latest"}


def test_of_two_savers_one_counts_and_nothing_is_mixed(root: Any) -> None:
    first = folders.prepare_partial(root, 5)
    save(root, 5)

    with pytest.raises(CheckpointError, match="step_5 is there already, and stays: see that no other job"):
        publish.publish(root, first, fill(first, 5, content(7)), {folders.CONFIG: "train: {}\n"})

    assert torch.equal(StoredCheckpoint.open(root / "step_5").read("weight"), content(5))


@pytest.mark.slow
def test_the_store_refuses_a_second_manifest(root: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    save(root, 1)
    before = storage_of(root).read(root / "step_1/manifest.json")
    monkeypatch.setattr(type(root.fs), "exists", lambda *_args, **_kwargs: False)
    with pytest.raises(FileExistsError):
        storage_of(root).commit(root / "step_1/x", root / "step_1", "manifest.json", "{}")
    monkeypatch.undo()
    assert storage_of(root).read(root / "step_1/manifest.json") == before


@pytest.mark.slow
@pytest.mark.parametrize("fault", ["cuts", "losses", "halves", "refusals"])
def test_a_connection_that_is_lost_in_the_middle(fault: str, root: Any, server: S3) -> None:
    """What passes costs another request; nothing is lost or doubled."""
    save(root, 1)
    setattr(server.faults, fault, 1)
    folder = save(root, 2)
    setattr(server.faults, fault, 1)
    assert torch.equal(StoredCheckpoint.open(folder).read("weight"), content(2))
    assert verify(folder).step == 2
    setattr(server.faults, fault, 0)


@pytest.mark.slow
def test_the_answer_to_the_manifest_is_lost(root: Any, server: S3, monkeypatch: pytest.MonkeyPatch) -> None:
    """The request is repeated, and refused, since it was done."""
    partial, manifest = written(root, 2)
    storage = type(storage_of(root))
    commit = storage.commit

    def lossy(self: Any, *arguments: Any) -> None:
        server.faults.losses = 1
        commit(self, *arguments)

    monkeypatch.setattr(storage, "commit", lossy)
    folder = publish.publish(root, partial, manifest, {folders.CONFIG: "train: {}\n"})
    assert server.faults.losses == 0
    assert folders.latest_checkpoint(root) == folder == folders.newest_checkpoint(root)


@pytest.mark.slow
def test_a_store_that_stays_away_is_named_and_the_last_one_stays(root: Any, server: S3) -> None:
    good = save(root, 1)
    server.faults.refusals = 10_000
    try:
        with pytest.raises(OSError, match=r"SlowDown.*stays_away"):
            root.fs.retries = 1
            folders.prepare_partial(root, 2)
    finally:
        server.faults.refusals, root.fs.retries = 0, 5
    assert folders.start_from(root) == good


@pytest.mark.slow
def test_a_changed_or_cut_object_is_named(root: Any) -> None:
    folder = save(root, 4)
    name = next(iter(read_manifest(folder).part_files))
    data = bytearray(root.fs.cat_file((folder / name).path))
    data[len(data) // 2] ^= 1
    root.fs.pipe_file((folder / name).path, bytes(data))
    with pytest.raises(DamagedCheckpointError, match=name):
        StoredCheckpoint.open(folder).read("weight")
    root.fs.pipe_file((folder / name).path, bytes(data[:-8]))
    with pytest.raises(DamagedCheckpointError, match=f"{name} has .* bytes instead of .*aws s3 mv"):
        verify(folder)
    # Set aside as the message says, it neither counts nor goes.
    storage_of(root).set_damaged_aside(folder)
    assert folders.start_from(root) is None
    assert len(keys(root)) == 4


def test_places_that_are_none() -> None:
    with pytest.raises(ConfigError, match=r"nosuch://x: cannot be opened"):
        place_of("nosuch://x")
    assert str(place_of("file:///tmp/x")) == "/tmp/x"
