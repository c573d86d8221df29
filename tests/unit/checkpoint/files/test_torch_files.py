"""Checkpoints of formats 1 and 2 are read as torch reads them, in ranges, and nothing of them is run."""

import pickle
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.distributed.checkpoint as dcp
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor
from torch.distributed.checkpoint.default_planner import DefaultSavePlanner
from torch.distributed.checkpoint.filesystem import FileSystemWriter
from torch.distributed.checkpoint.metadata import (
    ChunkStorageMetadata,
    Metadata,
    MetadataIndex,
    TensorProperties,
    TensorStorageMetadata,
)

from k25_train.checkpoint.files.stored import StoredCheckpoint, Wanted
from k25_train.checkpoint.files.torch_files import METADATA, start_in
from k25_train.checkpoint.integrity import entry_of
from k25_train.checkpoint.manifest import FileEntry
from k25_train.errors import DamagedCheckpointError
from tests.helpers.part_files import any_tensor, write_manifest
from tests.helpers.written_checkpoints import malicious_pickle

STEPS = {"optimizer": {0: {"optimizer": {"param_groups": [{"lr": 0.1, "step": 7.0}, {"step": 7.0}]}}}}
TENSORS = {
    "model.weight": any_tensor(torch.bfloat16, 5, 7),
    "model.scalar": any_tensor(torch.float32),
    "optimizer.state.exp_avg.model.weight": any_tensor(torch.float32, 5, 7),
}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """As torch's own writer makes one."""
    state: dict[str, object] = {**TENSORS, "common_state/shard_0_1": [STEPS]}
    save_with_torch(tmp_path, state)
    return tmp_path


def save_with_torch(folder: Path, state: dict[str, object]) -> None:
    """As megatron-core does it: what is no tensor is one item."""
    planner = DefaultSavePlanner(flatten_state_dict=False)
    writer = FileSystemWriter(folder)
    dcp.save(state, storage_writer=writer, planner=planner, no_dist=True)
    metadata = read_metadata(folder)
    assert metadata.storage_meta is not None
    metadata.storage_meta.checkpoint_id = str(folder)
    write_metadata(folder, metadata)


def write_old_manifest(folder: Path) -> None:
    names = [path.name for path in folder.iterdir() if path.name != "manifest.json"]
    write_manifest(folder, {name: entry_of(folder / name) for name in names}, num_updates=None)


def write_metadata(folder: Path, metadata: Metadata) -> None:
    with (folder / METADATA).open("wb") as file:
        pickle.dump(metadata, file)
    write_old_manifest(folder)


def read_metadata(folder: Path) -> Metadata:
    with (folder / METADATA).open("rb") as file:
        found = pickle.load(file)
    assert isinstance(found, Metadata)
    return found


def test_what_torch_wrote_is_read_in_ranges(folder: Path) -> None:
    stored = StoredCheckpoint.open(folder)
    assert {name: (info.dtype, info.shape) for name, info in stored.tensors.items()} == {
        name: (tensor.dtype, tuple(tensor.shape)) for name, tensor in TENSORS.items()
    }
    for name, tensor in TENSORS.items():
        flat = tensor.reshape(-1)
        assert torch.equal(stored.read(name).view(torch.uint8), flat.view(torch.uint8))
        start, stop = flat.numel() // 3, flat.numel() // 2
        assert torch.equal(
            stored.read(name, start, stop).view(torch.uint8), flat[start:stop].view(torch.uint8)
        )
    assert stored.num_updates == 7


def write_stacked(folder: Path) -> Tensor:
    """A stack of experts, of which two ranks wrote two each: items of one tensor in two files."""
    whole = torch.arange(4 * 3 * 5, dtype=torch.float32).reshape(4, 3, 5)
    chunks, places = [], {}
    for rank in range(2):
        name = f"__{rank}_0.distcp"
        torch.save(whole[2 * rank : 2 * rank + 2].clone(), folder / name)
        offsets = torch.Size([2 * rank, 0, 0])
        chunks.append(ChunkStorageMetadata(offsets, torch.Size([2, 3, 5])))
        places[MetadataIndex("experts", offsets)] = storage_info(name, 0, (folder / name).stat().st_size)
    stored = TensorStorageMetadata(TensorProperties(dtype=torch.float32), whole.size(), chunks)
    write_metadata(folder, Metadata({"experts": stored}, storage_data=places))
    return whole


def storage_info(name: str, offset: int, length: int) -> object:
    from torch.distributed.checkpoint.filesystem import _StorageInfo

    return _StorageInfo(name, offset, length)


def test_items_of_several_files_are_one_tensor(tmp_path: Path) -> None:
    flat = write_stacked(tmp_path).reshape(-1)
    stored = StoredCheckpoint.open(tmp_path)
    assert torch.equal(stored.read("experts"), flat)
    found = [torch.empty(10), torch.empty(3)]
    stored.read_into([Wanted("experts", 25, 35), Wanted("experts", 0, 3)], found)
    assert torch.equal(found[0], flat[25:35])
    assert torch.equal(found[1], flat[:3])


@given(st.data())
def test_a_box_is_a_range_or_refused(data: st.DataObject) -> None:
    shape = data.draw(st.lists(st.integers(1, 4), max_size=3))
    offsets = [data.draw(st.integers(0, size - 1)) for size in shape]
    sizes = [data.draw(st.integers(1, size - offset)) for size, offset in zip(shape, offsets, strict=True)]
    box = tuple(slice(offset, offset + size) for offset, size in zip(offsets, sizes, strict=True))
    inside = np.atleast_1d(np.arange(np.prod(shape, dtype=int)).reshape(shape)[box]).reshape(-1)

    is_range = inside.tolist() == list(range(inside[0], inside[0] + len(inside)))
    if is_range:
        assert start_in(shape, offsets, sizes) == inside[0]
    else:
        with pytest.raises(ValueError, match="is no range of the flattened"):
            start_in(shape, offsets, sizes)


@pytest.mark.parametrize(
    ("offsets", "sizes"), [([0, 0], [2]), ([0], [5]), ([-1], [2]), ([3], [2]), ([0], [4, 1])]
)
def test_a_box_that_is_not_within_is_refused(offsets: Sequence[int], sizes: Sequence[int]) -> None:
    with pytest.raises(ValueError, match=r"within|is no range"):
        start_in([4], offsets, sizes)


def test_an_item_that_is_something_else_is_named(tmp_path: Path) -> None:
    write_stacked(tmp_path)
    torch.save(torch.zeros(2, 3, 4), tmp_path / "__1_0.distcp")
    with pytest.raises(DamagedCheckpointError, match=r"__1_0\.distcp: .*experts\[30:60\]"):
        StoredCheckpoint.open(tmp_path).read("experts")
    (tmp_path / "__1_0.distcp").write_bytes(malicious_pickle(tmp_path))
    with pytest.raises(DamagedCheckpointError, match=r"__1_0\.distcp"):
        StoredCheckpoint.open(tmp_path).read("experts")
    assert torch.equal(StoredCheckpoint.open(tmp_path).read("experts", 0, 5), torch.arange(5.0))


def test_metadata_that_lies_is_refused(tmp_path: Path) -> None:
    write_stacked(tmp_path)
    good = (tmp_path / METADATA).read_bytes()

    def first_chunk(metadata: Metadata) -> TensorStorageMetadata:
        found = metadata.state_dict_metadata["experts"]
        assert isinstance(found, TensorStorageMetadata)
        return found

    metadata = read_metadata(tmp_path)
    first_chunk(metadata).chunks[0].sizes = torch.Size([2, 2, 5])
    write_metadata(tmp_path, metadata)
    with pytest.raises(DamagedCheckpointError, match=r"\.metadata: experts: .*is no range of the flattened"):
        StoredCheckpoint.open(tmp_path)

    metadata = pickle.loads(good)
    index = MetadataIndex("experts", torch.Size([0, 0, 0]))
    metadata.storage_data[index] = storage_info("../__0_0.distcp", 0, 1)
    write_metadata(tmp_path, metadata)
    with pytest.raises(DamagedCheckpointError, match=r"'\.\./__0_0\.distcp' is not a file of the checkpoint"):
        StoredCheckpoint.open(tmp_path)

    metadata = pickle.loads(good)
    del metadata.storage_data[MetadataIndex("experts", torch.Size([2, 0, 0]))]
    write_metadata(tmp_path, metadata)
    with pytest.raises(DamagedCheckpointError, match="experts: elements 30 to 60 are missing"):
        StoredCheckpoint.open(tmp_path)


def test_optimizers_that_disagree_are_refused(tmp_path: Path) -> None:
    groups = [{"step": 7.0}, {"step": 8.0}]
    state: dict[str, object] = {
        **TENSORS,
        "common_state/shard_0_1": [{"optimizer": {"param_groups": groups}}],
    }
    save_with_torch(tmp_path, state)
    with pytest.raises(DamagedCheckpointError, match=r"its optimizers count \[7, 8\] steps"):
        print(StoredCheckpoint.open(tmp_path).num_updates)


def test_a_file_of_format_1_has_no_checksum(folder: Path) -> None:
    sizes = {path.name: FileEntry(path.stat().st_size) for path in folder.iterdir()}
    text = '{"format_version": 1, "step": 5, "file_bytes": %s}'
    listed = ", ".join(
        f'"{name}": {entry.num_bytes}' for name, entry in sizes.items() if name != "manifest.json"
    )
    (folder / "manifest.json").write_text(text % f"{{{listed}}}")
    stored = StoredCheckpoint.open(folder)
    assert stored.manifest.version == 1
    assert stored.read("model.weight").numel() == 35
