"""What is written as parts is read back, any range of it, and by the safetensors library."""

from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors import safe_open
from torch import Tensor

from k25_train.checkpoint.files.parts import Part, whole
from k25_train.checkpoint.files.reader import plan
from k25_train.checkpoint.files.stored import (
    StoredCheckpoint,
    Wanted,
    complete_index,
    read_share,
)
from k25_train.checkpoint.files.writer import PartsWriter, even_shares, write_parts, write_rank
from k25_train.checkpoint.manifest import Manifest, read_manifest
from k25_train.errors import CheckpointError
from tests.helpers.part_files import (
    any_tensor,
    one_of_each_dtype,
    pieces_of,
    write_checkpoint,
    write_manifest,
)


def same_bits(found: Tensor, expected: Tensor) -> bool:
    """NaN equals NaN."""
    return found.dtype == expected.dtype and torch.equal(
        found.reshape(-1).view(torch.uint8), expected.reshape(-1).view(torch.uint8)
    )


TENSORS = one_of_each_dtype()


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """All dtypes, in pieces over four files in no order of names."""
    folder = tmp_path_factory.mktemp("checkpoint")
    pairs = pieces_of(TENSORS, 5)
    write_checkpoint(folder, {f"rank_{3 - rank:05d}_0.safetensors": pairs[rank::4] for rank in range(4)})
    return folder


def test_every_dtype_comes_back_bit_by_bit(folder: Path) -> None:
    stored = StoredCheckpoint.open(folder)
    assert {name: (info.dtype, info.shape) for name, info in stored.tensors.items()} == {
        name: (tensor.dtype, tuple(tensor.shape)) for name, tensor in TENSORS.items()
    }
    for name, tensor in TENSORS.items():
        assert same_bits(stored.read(name), tensor), name
    assert stored.num_updates == 5


def test_the_safetensors_library_reads_the_files(folder: Path) -> None:
    found: dict[str, list[tuple[int, Tensor]]] = {name: [] for name in TENSORS}
    for path in folder.glob("*.safetensors"):
        with safe_open(path, "pt") as file:
            for entry in file.keys():  # noqa: SIM118, it is no dict
                if entry.endswith("]"):
                    name, _, span = entry.rpartition("[")
                    found[name].append((int(span.split(":")[0]), file.get_tensor(entry)))
            assert file.get_tensor("checksums").dtype == torch.uint64
    for name, parts in found.items():
        assert same_bits(
            torch.cat([part for _, part in sorted(parts, key=lambda each: each[0])]), TENSORS[name]
        )


@given(st.data())
@settings(max_examples=60, deadline=None)
def test_any_ranges_are_read_at_once(folder: Path, data: st.DataObject) -> None:
    stored = StoredCheckpoint.open(folder)
    wanted = []
    for _ in range(data.draw(st.integers(0, 5))):
        name = data.draw(st.sampled_from(sorted(TENSORS)))
        start = data.draw(st.integers(0, TENSORS[name].numel()))
        wanted.append(Wanted(name, start, data.draw(st.integers(start, TENSORS[name].numel()))))
    destinations = [torch.empty(each.stop - each.start, dtype=TENSORS[each.name].dtype) for each in wanted]

    stored.read_into(wanted, destinations)

    for each, destination in zip(wanted, destinations, strict=True):
        assert same_bits(destination, TENSORS[each.name].reshape(-1)[each.start : each.stop])


def test_what_is_wanted_twice_is_read_once(folder: Path) -> None:
    stored = StoredCheckpoint.open(folder)
    numel = TENSORS["large"].numel()
    twice = stored.overlaps([Wanted("large", 0, numel), Wanted("large", 0, numel)])
    assert plan(stored.parts, twice, is_local=True).num_bytes <= 1.001 * TENSORS["large"].nbytes


def test_shares_of_headers_make_the_whole(folder: Path) -> None:
    manifest = read_manifest(folder)
    shares = [read_share(folder, manifest, share, 5) for share in range(5)]
    assert [len(share.files) for share in shares] == [1, 1, 1, 1, 0]
    stored = StoredCheckpoint(folder, manifest, complete_index(folder, shares))
    assert list(stored.tensors) == sorted(TENSORS)
    for name, tensor in TENSORS.items():
        assert same_bits(stored.read(name), tensor), name


@pytest.mark.parametrize("num_writers", [1, 2, 3, 8])
def test_a_rank_writes_files_of_equal_size(tmp_path: Path, num_writers: int) -> None:
    tensors = {"big": any_tensor(torch.float32, 1_000_003), "small": any_tensor(torch.bfloat16, 7)} | TENSORS
    pairs = pieces_of(tensors, 2)
    entries = write_rank(tmp_path, 12, pairs, num_writers)
    write_manifest(tmp_path, entries)

    assert sorted(entries) == [f"rank_00012_{index}.safetensors" for index in range(num_writers)]
    assert {name: (tmp_path / name).stat().st_size for name in entries} == {
        name: entry.num_bytes for name, entry in entries.items()
    }
    sizes = [entry.num_bytes for entry in entries.values()]
    assert max(sizes) - min(sizes) < 600_000
    stored = StoredCheckpoint.open(tmp_path)
    for name, tensor in tensors.items():
        assert same_bits(stored.read(name), tensor), name


@given(st.lists(st.integers(0, 3_000_000), max_size=6), st.integers(1, 9))
@settings(max_examples=50, deadline=None)
def test_shares_hold_everything_in_order(numels: list[int], count: int) -> None:
    pairs = [
        (whole(str(number), torch.int8, (numel,)), torch.empty(numel, dtype=torch.int8))
        for number, numel in enumerate(numels)
    ]
    shares = even_shares(pairs, count)
    assert len(shares) <= count
    assert all(shares)
    assert sum(part.numel for share in shares for part, _ in share) == sum(numels)
    assert all(part.numel == tensor.numel() for share in shares for part, tensor in share)
    at = dict.fromkeys(map(str, range(len(numels))), 0)
    for part, _ in (pair for share in shares for pair in share):
        assert part.start == at[part.name]
        at[part.name] = part.stop


def test_a_tensor_may_come_piece_by_piece(tmp_path: Path) -> None:
    tensor = any_tensor(torch.bfloat16, 400_000)
    parts = [
        Part("a", tensor.dtype, (400_000,), 0, 399_999),
        Part("a", tensor.dtype, (400_000,), 399_999, 400_000),
    ]
    with PartsWriter(tmp_path / "pieces.safetensors", parts) as writer:
        for start, stop in ((0, 1), (1, 131_073), (131_073, 399_999), (399_999, 400_000)):
            writer.write(tensor[start:stop])
    at_once = write_parts(
        tmp_path / "whole.safetensors", [(part, tensor[part.start : part.stop]) for part in parts]
    )
    assert writer.entry == at_once
    assert (tmp_path / "pieces.safetensors").read_bytes() == (tmp_path / "whole.safetensors").read_bytes()


def test_what_does_not_fit_is_not_written(tmp_path: Path) -> None:
    part = whole("a", torch.float32, (4,))
    cases = [
        ([(part, torch.zeros(3))], "3 elements"),
        ([(part, torch.zeros(4, dtype=torch.float64))], "float64"),
        ([(part, torch.zeros(8)[::2])], "not contiguous"),
        ([(part, torch.zeros(4)), (part, torch.zeros(4))], "comes twice"),
        ([(part, torch.zeros(4)), (whole("a", torch.float32, (5,)), torch.zeros(5))], "a is both"),
    ]
    for number, (pairs, text) in enumerate(cases):
        with pytest.raises(ValueError, match=text):
            write_parts(tmp_path / f"{number}.safetensors", pairs)
    short = PartsWriter(tmp_path / "short.safetensors", [part])
    with pytest.raises(ValueError, match=r"8 bytes of a\[0:4\] were not written"), short as writer:
        writer.write(torch.zeros(2))
    with pytest.raises(RuntimeError, match="not complete"):
        print(writer.entry)
    with pytest.raises(CheckpointError, match="are not in its shape"):
        Part("a", torch.float32, (2, 2), 0, 5)
    with pytest.raises(CheckpointError, match="cannot be stored"):
        whole("a", torch.complex64, (4,))


def test_nothing_is_written_over(tmp_path: Path) -> None:
    pair = (whole("a", torch.float32, (4,)), torch.zeros(4))
    write_parts(tmp_path / "a.safetensors", [pair])
    with pytest.raises(FileExistsError):
        write_parts(tmp_path / "a.safetensors", [pair])


def test_what_is_asked_wrongly_is_named(folder: Path) -> None:
    stored = StoredCheckpoint.open(folder)
    with pytest.raises(CheckpointError, match="has no tensor other"):
        stored.read("other")
    with pytest.raises(CheckpointError, match="large: elements 5 to 2000000 are not within its"):
        stored.read("large", 5, 2_000_000)
    with pytest.raises(
        CheckpointError, match=r"elements 0 to 4 of large are torch.bfloat16, but 4 of torch.float32"
    ):
        stored.read_into([Wanted("large", 0, 4)], [torch.empty(4)])
    with pytest.raises(ValueError, match="contiguous"):
        stored.read_into([Wanted("large", 0, 4)], [torch.empty(8, dtype=torch.bfloat16)[::2]])


def test_an_import_has_no_updates(tmp_path: Path) -> None:
    write_checkpoint(tmp_path, {"a.safetensors": pieces_of(TENSORS, 1)}, kind="weights", num_updates=None)
    stored = StoredCheckpoint.open(tmp_path)
    assert stored.manifest.kind == "weights"
    with pytest.raises(CheckpointError, match="has no optimizer: it holds weights"):
        print(stored.num_updates)


def test_the_manifest_of_format_3_comes_back(folder: Path) -> None:
    manifest = Manifest(
        step=7,
        files=read_manifest(folder).files,
        facts={"a": "b"},
        layout={"pp": 4, "dep": "coupled"},
        losses=[2.5],
        num_updates=6,
    )
    assert Manifest.from_text(manifest.to_text()) == manifest
    assert all(file.has_parts for file in manifest.files.values())
