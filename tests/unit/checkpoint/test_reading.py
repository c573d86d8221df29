"""What is unpickled of a checkpoint: its own parts, and nothing that could act."""

import io
import pickle
from pathlib import Path

import pytest
import torch
from torch.distributed.checkpoint.metadata import (
    Metadata,
    MetadataIndex,
    TensorProperties,
    TensorStorageMetadata,
)

from k25_train.checkpoint.files.plain_pickle import bytes_by_file, load_metadata
from tests.helpers.written_checkpoints import malicious_pickle


def stored(path: str, offset: int, length: int) -> object:
    from torch.distributed.checkpoint.filesystem import _StorageInfo

    return _StorageInfo(path, offset, length)


def metadata() -> Metadata:
    tensor = TensorStorageMetadata(TensorProperties(dtype=torch.bfloat16), torch.Size([2, 3]), [])
    places = {
        MetadataIndex("a", [0]): stored("__0_0.distcp", 0, 10),
        MetadataIndex("a", [1]): stored("__0_0.distcp", 30, 7),
        MetadataIndex("b"): stored("__1_0.distcp", 5, 5),
    }
    return Metadata(state_dict_metadata={"a": tensor}, storage_data=places)


def test_ours_is_read_whole(tmp_path: Path) -> None:
    (tmp_path / ".metadata").write_bytes(pickle.dumps(metadata()))
    with (tmp_path / ".metadata").open("rb") as file:
        assert load_metadata(file) == metadata()
    assert bytes_by_file(tmp_path / ".metadata") == {"__0_0.distcp": 37, "__1_0.distcp": 10}


@pytest.mark.parametrize(
    "name",
    [
        "builtins eval",
        "builtins getattr",
        "os system",
        "posix system",
        "subprocess Popen",
        "functools partial",
        "operator attrgetter",
        "torch load",
        "torch.serialization load",
        "torch.serialization os",
        "torch.distributed.checkpoint.filesystem os",
        "torch.distributed.checkpoint.metadata os.system",
        "torch.storage _load_from_bytes",
    ],
)
@pytest.mark.parametrize("protocol", [0, 4])
def test_other_names_are_refused(name: str, protocol: int) -> None:
    module, attribute = name.split()
    if protocol == 0:
        asked = f"c{module}\n{attribute}\n.".encode()
    else:
        texts = b"".join(b"\x8c" + bytes([len(text)]) + text.encode() for text in (module, attribute))
        asked = b"\x80\x04" + texts + b"\x93."
    with pytest.raises(pickle.UnpicklingError, match="it asks for"):
        load_metadata(io.BytesIO(asked))


def test_code_does_not_run(tmp_path: Path) -> None:
    with pytest.raises(pickle.UnpicklingError, match="which no checkpoint has"):
        load_metadata(io.BytesIO(malicious_pickle(tmp_path / "ran")))
    assert not (tmp_path / "ran").exists()


@pytest.mark.parametrize(
    "content", [b"", b"garbage", b"\x80\x04N.", b"\x80\x04]\x94.", bytes(1000), b"(" * 1000]
)
def test_garbage_is_told_as_such(content: bytes) -> None:
    with pytest.raises(pickle.UnpicklingError):
        load_metadata(io.BytesIO(content))


def test_every_cut_and_many_flips_are_told_as_such() -> None:
    whole = pickle.dumps(metadata())
    for end in range(0, len(whole) - 1, 7):
        with pytest.raises(pickle.UnpicklingError):
            load_metadata(io.BytesIO(whole[:end]))
    for place in range(len(whole)):
        flipped = bytearray(whole)
        flipped[place] ^= 0x41
        try:
            load_metadata(io.BytesIO(bytes(flipped)))
        except pickle.UnpicklingError:
            continue
