"""Shard sets: what is written is read back, and everything wrong with one is refused by name."""

import json
import tarfile
from fractions import Fraction
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from k25_train.data.folder import DataFolder
from k25_train.data.formats.dataset import load_dataset
from k25_train.data.formats.frame_times import FrameTimes
from k25_train.data.formats.index import IndexHeader, parse_index, write_index
from k25_train.data.formats.records import MediaSegment, SampleRecord, TextSegment
from k25_train.data.formats.shard_reader import ShardReader
from k25_train.data.formats.shard_writer import MediaPart, ShardWriter, TextPart
from k25_train.errors import DataError
from tests.helpers.tiny_shards import write_tiny_shard_set

PICTURE = MediaPart(type="image", data=b"\x89PNG" * 300, format="png", width=30, height=20)
CLIP = MediaPart(
    type="video",
    data=b"clip",
    format="mp4",
    width=8,
    height=6,
    num_frames=9,
    duration_s=1.5,
    frame_times="1/6 1x9",
)


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tiny_shard_set(tmp_path_factory.mktemp("tiny"))


@pytest.fixture
def shard_set(tmp_path: Path) -> Path:
    return write_tiny_shard_set(tmp_path / "set")


def test_samples_and_media_are_read_back_by_offset(tmp_path: Path) -> None:
    parts = [PICTURE, TextPart(text="Ein Häuschen", num_tokens=3, loss=False), CLIP]
    with ShardWriter(tmp_path / "train-00000.tar", "0" * 64) as writer:
        writer.add("a", "text", "s", "MIT", [TextPart(text="words", num_tokens=1)])
        written = writer.add("b", "caption", "s", "MIT", parts)

    index = tmp_path / "train-00000.index.jsonl"
    _, records = parse_index(str(index), index.read_bytes())
    reader = ShardReader(DataFolder(str(tmp_path)))

    assert records[1] == written
    assert reader.read_texts(records[0]) == ("words",)
    assert reader.read_texts(records[1]) == ("", "Ein Häuschen", "")
    picture, text, clip = records[1].segments
    assert text == TextSegment(num_tokens=3, loss=False)
    assert isinstance(picture, MediaSegment)
    assert isinstance(clip, MediaSegment)
    assert reader.read(picture.shard, picture.offset, picture.num_bytes) == PICTURE.data
    assert reader.read(clip.shard, clip.offset, clip.num_bytes) == CLIP.data
    assert (clip.num_frames, clip.duration_s, clip.width, clip.height) == (9, 1.5, 8, 6)


def test_shard_is_a_plain_tar_in_webdataset_naming(tmp_path: Path) -> None:
    with ShardWriter(tmp_path / "train-00000.tar", "0" * 64) as writer:
        writer.add("a", "caption", "s", "MIT", [PICTURE, TextPart(text="words", num_tokens=1)])

    with tarfile.open(tmp_path / "train-00000.tar") as tar:
        assert tar.getnames() == ["a.0.png", "a.json"]
        content = json.load(tar.extractfile("a.json"))

    assert content["licence"] == "MIT"
    assert content["segments"][0] == {"type": "image", "member": "0.png"}


def test_equal_samples_give_equal_bytes(tmp_path: Path) -> None:
    for name in ("one", "two"):
        (tmp_path / name).mkdir()
        with ShardWriter(tmp_path / name / "train-00000.tar", "0" * 64) as writer:
            writer.add("a", "caption", "s", "MIT", [PICTURE])

    one, two = (sorted((tmp_path / name).iterdir()) for name in ("one", "two"))
    assert [path.read_bytes() for path in one] == [path.read_bytes() for path in two]


def test_writing_that_fails_leaves_nothing_behind(tmp_path: Path) -> None:
    with pytest.raises(RuntimeError), ShardWriter(tmp_path / "train-00000.tar", "0" * 64) as writer:
        writer.add("a", "caption", "s", "MIT", [PICTURE])
        raise RuntimeError("stop")

    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("key", "kind", "message"),
    [("a", "caption", "'a' is taken"), ("a.b", "caption", "a.b"), ("c", "sound", "'sound'.*text, caption")],
)
def test_bad_keys_and_kinds_are_refused(tmp_path: Path, key: str, kind: str, message: str) -> None:
    with ShardWriter(tmp_path / "train-00000.tar", "0" * 64) as writer:
        writer.add("a", "caption", "s", "MIT", [PICTURE])
        with pytest.raises(DataError, match=message):
            writer.add(key, kind, "s", "MIT", [PICTURE])


printable = st.text(st.characters(exclude_categories=("C", "Z")))


def clip_segment(unit_s: Fraction, runs: list[tuple[int, int]]) -> MediaSegment:
    times = FrameTimes(unit_s, tuple(runs))
    return MediaSegment(
        type="video",
        shard="x.tar",
        offset=1,
        num_bytes=10**13,
        format="mp4",
        width=3,
        height=4,
        num_frames=times.num_frames,
        duration_s=times.duration_s,
        frame_times=str(times),
    )


segments = st.one_of(
    st.builds(TextSegment, num_tokens=st.integers(0, 2**38), loss=st.booleans()),
    st.builds(
        MediaSegment,
        type=st.just("image"),
        shard=st.just("x.tar"),
        offset=st.integers(0, 2**50),
        num_bytes=st.integers(10**6, 2**40),
        format=st.just("png"),
        width=st.integers(1, 10**5),
        height=st.integers(1, 10**5),
        num_frames=st.just(1),
        duration_s=st.just(0.0),
        frame_times=st.just(""),
        crc32=st.sampled_from(["", "0123abcd"]),
    ),
    st.builds(
        clip_segment,
        st.fractions(Fraction(1, 10**6), 10),
        st.lists(st.tuples(st.integers(1, 10**6), st.integers(1, 10**6)), min_size=1, max_size=5),
    ),
)
records_lists = st.lists(
    st.builds(
        SampleRecord,
        shard=st.just("x.tar"),
        key=st.text(st.characters(exclude_categories=("C", "Z")), min_size=1),
        kind=st.sampled_from(["text", "caption", "ocr", "video"]),
        source=printable,
        offset=st.integers(0, 2**50),
        num_bytes=st.just(2**40),
        segments=st.lists(segments, max_size=4).map(tuple),
    ),
    max_size=5,
)


@settings(max_examples=50)
@given(records_lists)
def test_index_round_trip(tmp_path_factory: pytest.TempPathFactory, records: list[SampleRecord]) -> None:
    path = tmp_path_factory.getbasetemp() / "round_trip.index.jsonl"
    header = IndexHeader(
        format_version=2, shard="x.tar", shard_bytes=2**51, tokenizer_sha256="", num_samples=len(records)
    )

    write_index(str(path), header, records)

    assert parse_index(str(path), path.read_bytes()) == (header, records)


def test_tiny_set_loads_with_both_splits(tiny: Path) -> None:
    dataset = load_dataset(str(tiny))

    assert {split: len(records) for split, records in dataset.splits.items()} == {"train": 48, "heldout": 24}
    assert len({record.shard for record in dataset.splits["train"]}) == 3
    assert dataset.sources[0].licence == "CC0-1.0"


def test_absent_set_is_named_with_the_remedy(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"nowhere/dataset.json: no such file.*k25_train.data build"):
        load_dataset(str(tmp_path / "nowhere"))


def test_shard_cut_short_is_named_with_both_sizes(shard_set: Path) -> None:
    shard = shard_set / "train-00001.tar"
    size = shard.stat().st_size
    shard.write_bytes(shard.read_bytes()[: size - 1000])

    with pytest.raises(
        DataError, match=rf"train-00001.tar: has {size - 1000} bytes.*{size}.*cut short.*again"
    ):
        load_dataset(str(shard_set))


def test_shard_cut_short_while_in_use_is_named(shard_set: Path) -> None:
    dataset = load_dataset(str(shard_set))
    record = dataset.splits["train"][-1]
    shard = shard_set / record.shard
    shard.write_bytes(shard.read_bytes()[: record.offset + 10])

    with pytest.raises(DataError, match=rf"{record.shard}.*cut short while in use"):
        dataset.reader.read_texts(record)


def test_missing_shard_is_named(shard_set: Path) -> None:
    (shard_set / "train-00002.tar").unlink()

    with pytest.raises(DataError, match=r"train-00002.tar: no such shard"):
        load_dataset(str(shard_set))


def test_incomplete_index_is_named_with_both_counts(shard_set: Path) -> None:
    index = shard_set / "train-00000.index.jsonl"
    index.write_text("".join(index.read_text().splitlines(keepends=True)[:-3]))

    with pytest.raises(DataError, match=r"train-00000.index.jsonl: holds 13 samples.*says 16"):
        load_dataset(str(shard_set))


@pytest.mark.parametrize(
    ("line", "replacement", "message"),
    [
        (0, "{}", "line 1: not an index header"),
        (0, None, "line 1: not an index header"),
        (3, "{not json", "line 4: not a sample record"),
        (3, '{"key": "x"}', "line 4: not a sample record"),
    ],
)
def test_malformed_index_lines_are_named(
    shard_set: Path, line: int, replacement: str | None, message: str
) -> None:
    index = shard_set / "train-00000.index.jsonl"
    lines = index.read_text().splitlines()
    lines[line] = "" if replacement is None else replacement
    index.write_text("\n".join(lines))

    with pytest.raises(DataError, match=message):
        load_dataset(str(shard_set))


@pytest.mark.parametrize(
    ("field", "value", "message"),
    [
        ("width", 0, "impossible sizes"),
        ("duration_s", float("nan"), "impossible sizes"),
        ("type", "sound", "sound"),
    ],
)
def test_impossible_media_in_an_index_is_refused(
    shard_set: Path, field: str, value: float | str, message: str
) -> None:
    index = shard_set / "train-00000.index.jsonl"
    lines = index.read_text().splitlines()
    record = json.loads(lines[2])
    record["segments"][0][field] = value
    lines[2] = json.dumps(record)
    index.write_text("\n".join(lines))

    with pytest.raises(DataError, match=rf"line 3.*{message}"):
        load_dataset(str(shard_set))


def test_foreign_tokenizer_is_refused(shard_set: Path) -> None:
    other = shard_set / "other.json"
    other.write_text("{}")

    with pytest.raises(DataError, match=r"counted with tokenizer .*other.json.*data.tokenizer"):
        load_dataset(str(shard_set), str(other))
    with pytest.raises(DataError, match=r"absent.json: no such tokenizer"):
        load_dataset(str(shard_set), str(shard_set / "absent.json"))


@pytest.mark.parametrize(
    ("manifest", "message"),
    [("{", "not valid JSON"), ("[]", "format_version is None"), ('{"format_version": 2}', "malformed")],
)
def test_malformed_manifest_is_refused(shard_set: Path, manifest: str, message: str) -> None:
    (shard_set / "dataset.json").write_text(manifest)

    with pytest.raises(DataError, match=message):
        load_dataset(str(shard_set))


def test_index_of_another_shard_set_version_is_refused(shard_set: Path) -> None:
    index = shard_set / "heldout-00000.index.jsonl"
    index.write_text(index.read_text().replace('"format_version": 2', '"format_version": 9', 1))

    with pytest.raises(DataError, match=r"heldout-00000.index.jsonl: format_version is 9"):
        load_dataset(str(shard_set))
