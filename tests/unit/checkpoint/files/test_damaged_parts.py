"""What is not as it was written is found by whoever reads it, and named."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor

from k25_train.checkpoint.files.header import BLOCK_BYTES, digest_of
from k25_train.checkpoint.files.parts import Part, whole
from k25_train.checkpoint.files.stored import StoredCheckpoint
from k25_train.checkpoint.files.writer import _write_all, write_parts, write_rank
from k25_train.checkpoint.manifest import MANIFEST, FileEntry, read_manifest
from k25_train.errors import CheckpointError, DamagedCheckpointError
from tests.helpers.part_files import any_tensor, write_checkpoint, write_manifest

NAME = "rank_00000_0.safetensors"
A = any_tensor(torch.float32, 3, 50_001)
B = any_tensor(torch.bfloat16, 9)
PAIRS = [
    (Part("a", A.dtype, (3, 50_001), 0, 70_000), A.reshape(-1)[:70_000]),
    (whole("b", B.dtype, (9,)), B),
    (Part("a", A.dtype, (3, 50_001), 70_000, 150_003), A.reshape(-1)[70_000:]),
]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    write_checkpoint(tmp_path, {NAME: PAIRS})
    return tmp_path


def read_all(folder: Path) -> dict[str, Tensor]:
    stored = StoredCheckpoint.open(folder)
    return {name: stored.read(name) for name in stored.tensors}


def flip(path: Path, at: int) -> None:
    with path.open("r+b") as file:
        file.seek(at)
        byte = file.read(1)[0]
        file.seek(at)
        file.write(bytes([byte ^ 4]))


def test_a_flipped_byte_anywhere_is_found(folder: Path) -> None:
    """In length, header, data, padding and checksums; a few hundred places, all boundaries among them."""
    path = folder / NAME
    size, header = path.stat().st_size, 8 + int.from_bytes(path.read_bytes()[:8], "little")
    last_data = size - 8 * 5
    places = {
        *range(8),
        *range(8, header, 5),
        header - 1,
        *range(header, size, size // 150),
        last_data - 1,
        last_data,
        size - 1,
    }
    places |= {header + BLOCK_BYTES - 1, header + BLOCK_BYTES, header + 280_000 - 1, header + 280_000}
    padding = range(header + 280_018, header + 280_024)
    for at in sorted(places - set(padding)):
        flip(path, at)
        with pytest.raises(DamagedCheckpointError, match=NAME):
            read_all(folder)
        flip(path, at)
    # No tensor has these.
    flip(path, padding[0])
    assert len(read_all(folder)) == 2


def test_what_is_not_read_need_not_be_whole(folder: Path) -> None:
    """Blocks that are not wanted are not read, so a load of the rest goes on."""
    header = 8 + int.from_bytes((folder / NAME).read_bytes()[:8], "little")
    flip(folder / NAME, header + BLOCK_BYTES + 5)
    stored = StoredCheckpoint.open(folder)
    assert torch.equal(stored.read("a", 0, 1000).view(torch.uint8), A.reshape(-1)[:1000].view(torch.uint8))
    with pytest.raises(DamagedCheckpointError, match=r"of a\[0:70000\], are not as they were written"):
        stored.read("a", 65_530, 65_540)
    unchecked = StoredCheckpoint(folder, stored.manifest, stored.parts, compares=False)
    assert unchecked.read("a").numel() == A.numel()


@pytest.mark.parametrize("left", [0, 7, 8, 100, 0.5, -8, -1])
def test_a_file_that_was_cut_short_is_found(folder: Path, left: float) -> None:
    path = folder / NAME
    size = path.stat().st_size
    with path.open("r+b") as file:
        file.truncate(int(size * left) if 0 < left < 1 else int(left) % size)
    with pytest.raises(DamagedCheckpointError, match=NAME):
        read_all(folder)


def test_a_file_that_is_gone_is_named(folder: Path) -> None:
    (folder / NAME).unlink()
    with pytest.raises(DamagedCheckpointError, match=f"{NAME}: .*No such file"):
        read_all(folder)


def test_a_file_of_another_checkpoint_is_found(folder: Path, tmp_path: Path) -> None:
    other = tmp_path / "other"
    other.mkdir()
    write_checkpoint(other, {NAME: [(part, tensor.clone().zero_()) for part, tensor in PAIRS]})
    shutil.copy(other / NAME, folder / NAME)
    with pytest.raises(DamagedCheckpointError, match="its checksums are not as they were written"):
        read_all(folder)


def rewrite_header(folder: Path, change: Callable[[dict[str, dict[str, object]]], object]) -> None:
    """Change the header and let the manifest agree: what somebody made by hand."""
    data = (folder / NAME).read_bytes()
    length = int.from_bytes(data[:8], "little")
    header = json.loads(data[8 : 8 + length])
    changed = change(header)
    text = changed if isinstance(changed, bytes) else json.dumps(header).encode()
    start = len(text).to_bytes(8, "little") + text
    (folder / NAME).write_bytes(start + data[8 + length :])
    old = read_manifest(folder).files[NAME]
    entry = FileEntry(
        len(start) + len(data) - 8 - length, header_xxh3=digest_of(start), table_xxh3=old.table_xxh3
    )
    write_manifest(folder, {NAME: entry})


def test_headers_that_lie_are_refused(folder: Path) -> None:
    good = (folder / NAME).read_bytes(), (folder / MANIFEST).read_bytes()
    entry = "b[0:9]"
    cases: list[tuple[Callable[[dict[str, dict[str, object]]], object], str]] = [
        (lambda header: header.pop(entry), "leaves bytes 280000 to"),
        (
            lambda header: header[entry].update(data_offsets=[279_992, 280_010]),
            "leaves bytes 280000 to 279992",
        ),
        (lambda header: header[entry].update(data_offsets=[280_010, 280_000]), "10 bytes|ends before"),
        (lambda header: header[entry].update(dtype="F32"), "has 18 bytes for a shape"),
        (lambda header: header[entry].update(dtype="F4"), "damaged"),
        (lambda header: header[entry].update(shape=[8]), "has 18 bytes for a shape"),
        (lambda header: header[entry].update(data_offsets=[-1, 17]), "-1 is not a count"),
        (lambda header: header[entry].update(data_offsets=[True, 18]), "True is not a count"),
        (lambda header: header.update({"b[0:10]": header.pop(entry)}), "are not in its shape"),
        (lambda header: header.update({"b": header.pop(entry)}), "'b' is no part of a tensor"),
        (lambda header: header.update({"c[0:9]": header.pop(entry)}), "damaged"),
        (lambda header: header.pop("checksums"), "damaged"),
        (lambda header: header["checksums"].update(data_offsets=[0, 8]), "do not follow its data"),
        (lambda header: header.pop("__metadata__"), "damaged"),
        (lambda header: header.update(__metadata__={"k25_train": "{}"}), "damaged"),
        (
            lambda header: header.update(__metadata__={"k25_train": '{"format": 4, "block_bytes": 1}'}),
            "format 4",
        ),
        (lambda _: b"[]      ", "damaged"),
        (lambda _: b"not JSON", "Expecting"),
        (lambda _: b"[" * 100_000, "damaged|recursion|Expecting"),
    ]
    for change, text in cases:
        rewrite_header(folder, change)
        with pytest.raises(DamagedCheckpointError, match=f"{NAME}: .*({text})"):
            read_all(folder)
        (folder / NAME).write_bytes(good[0])
        (folder / MANIFEST).write_bytes(good[1])
    assert len(read_all(folder)) == 2


def test_a_header_of_huge_length_asks_for_no_memory(folder: Path) -> None:
    data = (folder / NAME).read_bytes()
    for length in (2**63, 2**40, len(data), 0, 1):
        (folder / NAME).write_bytes(length.to_bytes(8, "little") + data[8:])
        with pytest.raises(DamagedCheckpointError, match=f"{NAME}: its header would have {length} bytes"):
            read_all(folder)


def test_names_that_leave_the_folder_are_refused(folder: Path) -> None:
    entry = read_manifest(folder).files[NAME]
    for name in ("../outside.safetensors", "/etc/passwd", ""):
        write_manifest(folder, {name: entry})
        with pytest.raises(CheckpointError, match="is not a file of the checkpoint"):
            read_all(folder)


@pytest.mark.parametrize(
    ("second", "text"),
    [
        (Part("a", A.dtype, (3, 50_001), 70_001, 150_003), "a: elements 70000 to 70001 are missing"),
        (Part("a", A.dtype, (3, 50_001), 69_000, 150_003), "a: elements 69000 to 70000 are there twice"),
        (Part("a", torch.float64, (3, 50_001), 70_000, 150_003), "a is of torch.float"),
        (Part("a", A.dtype, (150_003,), 70_000, 150_003), "not of one checkpoint"),
        (Part("b", A.dtype, (80_000,), 0, 80_000), "a: elements 70000 to 150003 are missing"),
    ],
)
def test_files_that_do_not_make_a_whole_are_refused(folder: Path, second: Part, text: str) -> None:
    other = "rank_00001_0.safetensors"
    entry = write_parts(folder / other, [(second, torch.zeros(second.numel, dtype=second.dtype))])
    (folder / NAME).unlink()
    write_manifest(folder, {NAME: write_parts(folder / NAME, PAIRS[:1]), other: entry})
    with pytest.raises(DamagedCheckpointError, match=text):
        StoredCheckpoint.open(folder)


def test_a_full_disk_is_an_error() -> None:
    """`/dev/full` takes nothing."""
    with Path("/dev/full").open("wb", buffering=0) as file, pytest.raises(OSError, match="No space left"):
        _write_all(file, memoryview(bytes(100)))


def test_what_a_disk_takes_in_pieces_arrives_whole() -> None:
    taken = bytearray()

    class Slow:
        def write(self, data: memoryview) -> int:
            taken.extend(data[:7])
            return len(data[:7])

    _write_all(Slow(), memoryview(bytes(range(100))))
    assert taken == bytes(range(100))


def test_a_disk_that_fails_at_fsync_is_an_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fsync(_: int) -> None:
        raise OSError(5, "Input/output error")

    monkeypatch.setattr("os.fsync", fsync)
    with pytest.raises(OSError, match="Input/output error"):
        write_parts(tmp_path / NAME, PAIRS)


def test_one_writer_that_fails_is_an_error_of_all(tmp_path: Path) -> None:
    (tmp_path / "rank_00004_1.safetensors").mkdir()
    with pytest.raises(OSError, match="rank_00004_1"):
        write_rank(tmp_path, 4, PAIRS, 2)
