"""The index file of a source: what is written is read, in whatever parts; nothing else is taken for it."""

import struct
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from k25_train.data.formats import index_merge, index_writer
from k25_train.data.formats.index_builder import IndexBuilder, index_of_records
from k25_train.data.formats.index_layout import PREFIX, ShardInfo, SourceHeader
from k25_train.data.formats.index_merge import write_index
from k25_train.data.formats.index_prefix import IndexFileError, MissingIndexError
from k25_train.data.formats.index_writer import IndexWriter
from k25_train.data.formats.records import MediaSegment, SampleRecord, TextSegment
from k25_train.data.formats.source_index import SourceIndex
from k25_train.errors import DataError

HEADER = SourceHeader(format="webdataset", tokenizer_sha256="0" * 64)
SHARDS = [ShardInfo(name=f"{split}-{i}.tar", num_bytes=10**6, stamp=f"time {i}", split=split)
          for split in ("train", "heldout") for i in range(2)]  # fmt: skip


def records_of(shard: ShardInfo, count: int = 7) -> list[SampleRecord]:
    """Texts, captions and videos with several segments."""
    found = []
    for i in range(count):
        words = [TextSegment(num_tokens=10 * i + j, loss=j != 1) for j in range(1 + i % 3)]
        media = [
            MediaSegment(
                type=("image", "video")[i % 2], shard=shard.name, offset=100 * i + j, num_bytes=50,
                format=("png", "mp4", "jpg")[(i + j) % 3], width=10 + i, height=20 + j,
                num_frames=1 + i % 2 * 2, duration_s=float(i % 2), frame_times="1/3 1x3" if i % 2 else "",
                crc32=f"{i:08x}",
            )
            for j in range(i % 3)
        ]  # fmt: skip
        segments = [each for pair in zip(words, [*media, *words], strict=False) for each in pair][: i + 1]
        found.append(
            SampleRecord(
                shard=shard.name, key=f"é-{i}", kind="", source="s", offset=1000 * i, num_bytes=900,
                segments=tuple(dict.fromkeys(segments)), crc32=f"{2**31 + i:08x}",
            )
        )  # fmt: skip
    return found


SAMPLES = [(shard, records_of(shard)) for shard in SHARDS]
EVERY = [record for _, records in SAMPLES for record in records]


@pytest.fixture
def path(tmp_path: Path) -> Path:
    path = tmp_path / "source.k25index"
    write_index(path, [index_of_records(HEADER, SAMPLES)])
    return path


def read_all(index: SourceIndex) -> list[SampleRecord]:
    return [replace(index.record(item), kind="") for item in range(len(index))]


def test_what_is_written_is_read(path: Path) -> None:
    index = SourceIndex.open(path, "s")

    assert read_all(index) == EVERY == read_all(index_of_records(HEADER, SAMPLES).named("s"))
    assert {index.record(item).kind for item in range(len(index))} == {"text", "caption"}
    assert index.shards() == SHARDS
    assert index.header.splits == {"train": (0, 14), "heldout": (14, 28)}
    assert index.text_tokens.tolist() == [record.num_text_tokens for record in EVERY]
    assert index.header.num_tokens == sum(index.text_tokens)
    counts = np.diff(index.first_media)
    assert counts.tolist() == [len(record.media) for record in EVERY]


def test_the_file_does_not_depend_on_how_it_was_cut(
    path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(index_writer, "ROWS_IN_MEMORY", 5)
    monkeypatch.setattr(index_merge, "_CHUNK", 3)
    with IndexWriter(tmp_path / "spilled", HEADER, keeps_keys=True) as writer:
        for shard, records in SAMPLES:
            writer.add_shard(shard)
            for record in records:
                writer.add(record)
    parts = []
    for number, sample in enumerate(SAMPLES):
        parts.append(tmp_path / f"part-{number}")
        write_index(parts[-1], [index_of_records(HEADER, [sample])])
    write_index(tmp_path / "merged", parts)

    assert (tmp_path / "spilled").read_bytes() == path.read_bytes() == (tmp_path / "merged").read_bytes()
    assert not list(tmp_path.glob("*.parts")) + list(tmp_path.glob("*.partial"))


def test_texts_take_twenty_bytes_and_mix_with_other_items(tmp_path: Path) -> None:
    plain = ShardInfo(name="t.bin", num_bytes=10**9, has_checksums=False)
    offsets, sizes = np.arange(1000) * 8, np.full(1000, 8)
    with IndexWriter(tmp_path / "plain", HEADER) as writer:
        writer.add_shard(plain)
        writer.add_texts(offsets, sizes, sizes // 4)
    index = SourceIndex.open(tmp_path / "plain", "s")
    assert (tmp_path / "plain").stat().st_size < 20 * 1000 + 3000
    assert index.first_segment is None and index.first_media is None and not index.has_media
    assert index.record(999) == SampleRecord(
        shard="t.bin", key="999", kind="text", source="s", offset=7992, num_bytes=8,
        segments=(TextSegment(num_tokens=2, loss=True),),
    )  # fmt: skip

    write_index(tmp_path / "both", [index, index_of_records(HEADER, SAMPLES[:1])])
    both = SourceIndex.open(tmp_path / "both", "s")
    assert both.record(999).segments == index.record(999).segments and both.record(999).crc32 == ""
    assert read_all(both)[1000:] == SAMPLES[0][1]


def test_hashes_tell_sizes_and_contents_apart_but_not_files(tmp_path: Path) -> None:
    def hashes(samples: list[tuple[ShardInfo, list[SampleRecord]]]) -> tuple[str, str]:
        header = write_index(tmp_path / "i", [index_of_records(HEADER, samples)])
        return header.sizes_sha256, header.content_sha256

    shard, records = SAMPLES[0]
    sizes, content = hashes(SAMPLES)
    other = replace(records[0], crc32="00000000")
    longer = replace(records[0], segments=(TextSegment(num_tokens=999, loss=True),))
    moved = [replace(record, offset=record.offset + 7) for record in records]
    assert hashes([(shard, [other, *records[1:]]), *SAMPLES[1:]])[0] == sizes
    assert hashes([(shard, [other, *records[1:]]), *SAMPLES[1:]])[1] != content
    assert hashes([(shard, [longer, *records[1:]]), *SAMPLES[1:]])[0] != sizes
    assert hashes([(shard, moved), *SAMPLES[1:]]) == (sizes, content)


def _version(data: bytes) -> bytes:
    return data[:8] + struct.pack("<I", 4) + data[12:]


BROKEN: dict[str, tuple[Callable[[bytes], bytes], str]] = {
    "empty": (lambda data: b"", "is no index of a source .it has 0 bytes"),
    "something else": (
        lambda data: b'{"format_version": 2, "shard": 1}',
        "is no index of a source .it begins",
    ),
    "another version": (_version, "is an index of version 4, this code reads 3"),
    "cut in the header": (lambda data: data[:100], "its header alone"),
    "cut in a column": (lambda data: data[:-100], "cut short. Copy it again"),
    "no JSON": (lambda data: data[: PREFIX.size] + b"x" + data[PREFIX.size + 1 :], "its header is malformed"),
    "more items": (
        lambda data: data.replace(b'"num_items": 28', b'"num_items": 29'),
        "offset has 28 values",
    ),
    "no such column": (lambda data: data.replace(b'"text_tokens"', b'"fext_tokens"'), "header is malformed"),
}


@pytest.mark.parametrize(("edit", "message"), BROKEN.values(), ids=BROKEN.keys())
def test_a_broken_file_is_named(path: Path, edit: Callable[[bytes], bytes], message: str) -> None:
    path.write_bytes(edit(path.read_bytes()))
    with pytest.raises(IndexFileError, match=message) as raised:
        SourceIndex.open(path)
    assert str(path) in str(raised.value) and "k25_train.data index" in str(raised.value)


def test_values_that_no_sample_has_are_refused(path: Path, tmp_path: Path) -> None:
    with pytest.raises(MissingIndexError, match="no such index"):
        SourceIndex.open(tmp_path / "nowhere")
    index = SourceIndex.open(path)
    for column, value in (("offset", 10**6), ("shard", 9), ("media_format", 77), ("media_width", 0)):
        values = index.columns[column].copy()
        values[:] = value
        with pytest.raises(DataError, match="item 5: no sample has these values"):
            replace(index, columns={**index.columns, column: values}).record(5)


def test_what_an_index_cannot_hold_is_refused() -> None:
    builder = IndexBuilder(HEADER)
    builder.add_shard(SHARDS[0])
    record = SAMPLES[0][1][0]
    for change in ({"num_bytes": 2**32}, {"segments": (TextSegment(num_tokens=2**30, loss=True),)}):
        with pytest.raises(DataError, match="sample é-0: no index can hold its sizes"):
            builder.add(replace(record, **change))  # type: ignore[arg-type]
    with pytest.raises(DataError, match=r"train-0.tar: is twice"):
        builder.add_shard(SHARDS[0])
    apart = [SAMPLES[0], SAMPLES[2], SAMPLES[1]]
    with pytest.raises(DataError, match="shards of split 'train' do not follow one another"):
        write_index(Path("/nowhere/x"), [index_of_records(HEADER, apart)])


def test_an_interrupted_writer_leaves_nothing(tmp_path: Path) -> None:
    with pytest.raises(KeyboardInterrupt), IndexWriter(tmp_path / "i", HEADER) as writer:
        writer.add_shard(SHARDS[0])
        raise KeyboardInterrupt
    assert not list(tmp_path.iterdir())
