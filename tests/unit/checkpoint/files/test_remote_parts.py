"""Files of parts in an object store: ranges by few requests, and faults of the way told from damage."""

from collections.abc import Iterator
from typing import Any

import pytest
import torch

from k25_train.checkpoint.files.parts import Part
from k25_train.checkpoint.files.stored import StoredCheckpoint, Wanted
from k25_train.checkpoint.files.writer import PartsWriter
from k25_train.checkpoint.storage.places import place_of
from k25_train.errors import CheckpointError, DamagedCheckpointError
from tests.helpers.part_files import any_tensor, pieces_of, write_checkpoint
from tests.helpers.s3_server import KEYS, S3, s3_server

NAME = "rank_00000_0.safetensors"
LARGE = any_tensor(torch.bfloat16, 3, 400_001)
SMALL = {f"norm.{number}": any_tensor(torch.float32, 700) for number in range(40)}
TENSORS = {"large": LARGE} | SMALL


@pytest.fixture(scope="module")
def server() -> Iterator[S3]:
    with s3_server() as found:
        found.put("parts", {})
        yield found


@pytest.fixture
def folder(server: S3, monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest) -> Any:
    for name, value in KEYS.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setenv("AWS_ENDPOINT_URL", server.url)
    folder = place_of(f"s3://parts/{request.node.name}")
    write_checkpoint(folder, {NAME: pieces_of(TENSORS, 1)})
    return folder


def test_small_tensors_come_with_one_request(server: S3, folder: Any) -> None:
    stored = StoredCheckpoint.open(folder)
    server.faults.requests.clear()
    found = [torch.empty(700) for _ in SMALL]
    stored.read_into([Wanted(name, 0, 700) for name in SMALL], found)
    for destination, tensor in zip(found, SMALL.values(), strict=True):
        assert torch.equal(destination.view(torch.uint8), tensor.view(torch.uint8))
    asked = [span for method, path, span in server.faults.requests if method == "GET" and NAME in path]
    # The table of checksums, and all of them.
    assert len(asked) == 2
    assert all(asked)


def test_a_range_is_read_without_the_rest(server: S3, folder: Any) -> None:
    stored = StoredCheckpoint.open(folder)
    assert torch.equal(
        stored.read("large", 300_000, 300_010).view(torch.uint8),
        LARGE.reshape(-1)[300_000:300_010].view(torch.uint8),
    )
    first, last = server.faults.requests[-1][2].removeprefix("bytes=").split("-")
    assert int(last) - int(first) + 1 == 256 * 1024


def test_an_object_that_is_gone_or_short_is_damage(folder: Any) -> None:
    stored = StoredCheckpoint.open(folder)
    path = folder / NAME
    data = path.read_bytes()
    for left in (len(data) - 1, 1_000_000, 100):
        path.write_bytes(data[:left])
        with pytest.raises(DamagedCheckpointError, match=f"{NAME}: it ends at byte {left}"):
            StoredCheckpoint(folder, stored.manifest, stored.parts).read("large")
    path.unlink()
    with pytest.raises(DamagedCheckpointError, match=NAME):
        StoredCheckpoint(folder, stored.manifest, stored.parts).read("large")


def test_a_store_that_does_not_answer_is_no_damage(folder: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    stored = StoredCheckpoint.open(folder)

    def refuse(*_: object, **__: object) -> bytes:
        raise ConnectionResetError("connection reset")

    monkeypatch.setattr(folder.fs, "cat_file", refuse)
    with pytest.raises(CheckpointError, match=f"{NAME}: connection reset .* does not answer") as caught:
        stored.read("large")
    assert not isinstance(caught.value, DamagedCheckpointError)


def test_what_fails_on_the_way_leaves_no_object(folder: Any) -> None:
    with pytest.raises(RuntimeError, match="the importer died"):
        fail_while_writing(folder)
    assert not (folder / "half.safetensors").exists()


def fail_while_writing(folder: Any) -> None:
    part = Part("a", torch.float32, (10,), 0, 10)
    with PartsWriter(folder / "half.safetensors", [part]) as writer:
        writer.write(torch.zeros(5))
        raise RuntimeError("the importer died")
