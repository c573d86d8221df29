"""Tar shards of any layout are indexed and read back; what cannot be used is told with its place."""

import gzip
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import fsspec  # type: ignore[import-untyped]
import pytest
from PIL import Image

from k25_train.data.decode.items import plan_media
from k25_train.data.decode.media import MediaReader
from k25_train.data.folder import DataFolder
from k25_train.data.formats.index_builder import index_of_records
from k25_train.data.formats.index_layout import ShardInfo, SourceHeader
from k25_train.data.formats.index_merge import write_index
from k25_train.data.formats.left_out import facts_of
from k25_train.data.formats.reader import WordsReader
from k25_train.data.formats.records import SampleRecord, TextSegment
from k25_train.data.formats.sample_json import SampleError
from k25_train.data.formats.source_index import SourceIndex
from k25_train.data.tar import members
from k25_train.data.tar.indexer import TarIndexer
from k25_train.data.tar.layouts import StemLayout
from k25_train.data.tar.members import ReadAhead
from k25_train.data.tar.reader import TarReader
from k25_train.data.tokenizer import Tokenizer, load_tokenizer, train_tokenizer
from tests.helpers.media_files import Clip, corners, image_bytes
from tests.helpers.tar_shards import Content, indexed, picture, tar_bytes
from tests.helpers.tiny_shards import VOCAB_SIZE, make_picture, make_text, tiny_vision_config

VISION = tiny_vision_config()
Members = list[tuple[str, Content]]


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    path = tmp_path_factory.mktemp("tokenizer") / "tokenizer.json"
    train_tokenizer([make_text(400, seed) for seed in range(4)], VOCAB_SIZE, path)
    return load_tokenizer(path)


@pytest.fixture
def shard(tmp_path: Path) -> Callable[[Members], Path]:
    def write(members: Members) -> Path:
        (tmp_path / "s.tar").write_bytes(tar_bytes(members))
        return tmp_path / "s.tar"

    return write


def texts_of(path: Path, record: SampleRecord) -> list[tuple[str, bool]]:
    words = TarReader(DataFolder(str(path.parent)), StemLayout()).read_words(record)
    return [
        (each.text, segment.loss)
        for each, segment in zip(words, record.segments, strict=True)
        if isinstance(segment, TextSegment)
    ]


CLIP = Clip(stamps=[0, 3, 4, 20], turn=(0, 1, -1, 0))
MIXED: Members = [
    ("./a/b.jpg", picture()),
    ("./a/b.txt", "words in Ünïcode"),
    ("./a/b.json", {"caption": "not these", "width": 40}),
    ("__meta__/x.json", {"ignored": True}),
    ("q.json", {"question": "what?", "answer": "that"}),
    ("q.png", picture(30, 50, "PNG")),
    ("doc.json", {"texts": ["first", None, "second", None], "images": [None, "u", None, "v"]}),
    ("doc.1.webp", picture(20, 20, "WEBP")),
    ("doc.2.avif", picture(60, 20, "AVIF")),
    ("film.mp4", CLIP.encode([corners(64, 48)])),
    ("film.json", {"segments": [{"start": 0, "text": "a"}, {"start": 0.5, "text": "b"}]}),
    ("moving.json", [{"type": "video", "member": "gif"}, {"type": "text", "text": "moves"}]),
    (
        "moving.gif",
        image_bytes(make_picture(9, 9, 1), "GIF", save_all=True, append_images=[make_picture(9, 9, 2)]),
    ),
    (
        "still.gif",
        image_bytes(make_picture(9, 9, 1), "GIF", save_all=True, append_images=[make_picture(9, 9, 2)]),
    ),
    ("still.txt", "first frame"),
    ("words.json", [{"type": "text", "text": "no picture here"}]),
]


def test_every_layout_is_indexed_and_read_back(
    shard: Callable[[Members], Path], tokenizer: Tokenizer, tmp_path: Path
) -> None:
    path = shard(MIXED)

    records, skips = indexed(path, tokenizer)

    assert skips == []
    found = {record.key: texts_of(path, record) for record in records}
    assert found == {
        "a/b": [("words in Ünïcode", True)],
        "q": [("what?", False), ("that", True)],
        "doc": [("first", True), ("second", True)],
        "film": [("00:00:00.000 a\n", True), ("00:00:00.500 b\n", True)],
        "moving": [("moves", True)],
        "still": [("first frame", True)],
        "words": [("no picture here", True)],
    }
    assert [record.kind for record in records] == [
        *("caption", "caption", "caption", "video", "video", "caption", "text")
    ]
    media = {
        record.key: [(each.format, each.width, each.height) for each in record.media] for record in records
    }
    assert media["doc"] == [("webp", 20, 20), ("avif", 60, 20)]
    assert media["film"] == [("mp4", 48, 64)]
    # Media decode from where the index says, and the index file gives the same records.
    reader = TarReader(DataFolder(str(path.parent)), StemLayout())
    for segment in (segment for record in records for segment in record.media):
        assert MediaReader(reader, VISION).load(plan_media(segment, VISION)).failure is None
    header = SourceHeader(format="webdataset", tokenizer_sha256=tokenizer.sha256)
    info = ShardInfo(name=path.name, num_bytes=path.stat().st_size)
    write_index(tmp_path / "s.k25idx", [index_of_records(header, [(info, records)])])
    index = SourceIndex.open(tmp_path / "s.k25idx")
    words = WordsReader(reader, reader.read_words, tokenizer)
    for number, record in enumerate(records):
        again = index.record(number)
        assert (again.offset, again.segments, again.crc32) == (record.offset, record.segments, record.crc32)
        for position, segment in enumerate(again.segments):
            if isinstance(segment, TextSegment):
                text = reader.read_words(record)[position].text
                assert list(words.segment_tokens(again, position, 0, segment.num_tokens)) == tokenizer.encode(
                    text
                )
                assert list(words.segment_tokens(again, position, 1, 2)) == tokenizer.encode(text)[1:2]


JPEG = picture()
SKIPPED: dict[str, tuple[Members, str]] = {
    "image without text": ([("x.jpg", JPEG)], r"has no text \(.txt or .json\) among jpg"),
    "text without image": ([("x.txt", "a")], "is a text without an image or video"),
    "unknown members": ([("x.cls", "3"), ("x.npy", b"0")], "has neither text nor media"),
    "empty image": ([("x.jpg", b""), ("x.txt", "a")], r"its .jpg at byte \d+ is empty"),
    "empty text": ([("x.jpg", JPEG), ("x.txt", "")], "its text is empty"),
    "an error page": ([("x.jpg", "<html>"), ("x.txt", "a")], "is no image: it begins with b'<html>'"),
    "an image as video": ([("x.mp4", JPEG), ("x.txt", "a")], r"is an image \(jpg\), not a video"),
    "a head without an image": (
        [("x.jpg", JPEG[:30]), ("x.txt", "a")],
        "its .jpg at byte .* does not decode",
    ),
    "a damaged video": ([("x.mp4", b"\0\0\0\x18ftypmp42" + bytes(99)), ("x.txt", "a")], "does not decode"),
    "two members of a name": ([("x.jpg", JPEG), ("x.jpg", JPEG), ("x.txt", "a")], "two members x.jpg"),
    "two texts": ([("x.jpg", JPEG), ("x.a.txt", "a"), ("x.b.txt", "b")], "has 2 texts"),
    "a stem again": ([("good.jpg", JPEG), ("good.txt", "a")], "has the stem of an earlier sample"),
    "broken UTF-8": ([("x.jpg", JPEG), ("x.txt", b"a\xff")], r"not UTF-8 \(byte 1\)"),
    "broken JSON": ([("x.jpg", JPEG), ("x.json", "{")], "no sample JSON"),
    "other JSON": ([("x.jpg", JPEG), ("x.json", {"id": 3})], "none of caption"),
    "a bomb": (
        [("x.png", image_bytes(Image.new("1", (20_000, 20_000)), "PNG")), ("x.txt", "a")],
        "DecompressionBombError",
    ),
}


@pytest.mark.parametrize("name", SKIPPED)
def test_what_cannot_be_used_is_skipped_with_its_reason(
    name: str, shard: Callable[[Members], Path], tokenizer: Tokenizer
) -> None:
    bad, reason = SKIPPED[name]
    good: Members = [
        ("good.jpg", picture(seed=1)),
        ("good.txt", "good"),
        ("last.png", JPEG),
        ("last.txt", "b"),
    ]
    path = shard([*good[:2], ("other.jpg", JPEG), ("other.txt", "x"), *bad, *good[2:]])

    records, skips = indexed(path, tokenizer)

    assert [record.key for record in records] == ["good", "other", "last"]
    assert records[-1].media[0].format == "jpg"  # whatever its name says
    (skip,) = skips
    assert (skip.shard, skip.key) == ("s.tar", bad[0][0].split(".")[0])
    with pytest.raises(AssertionError, match=reason):
        raise AssertionError(str(skip))


def test_a_shard_cut_short(tmp_path: Path, tokenizer: Tokenizer) -> None:
    members: Members = [
        (f"{n}.{kind}", data) for n in range(3) for kind, data in (("jpg", JPEG), ("txt", "a"))
    ]
    data = tar_bytes(members)
    path = tmp_path / "s.tar"
    second = data.index(b"1.txt")
    for end, keys in ((second + 100, ["0"]), (second + 513, ["0", "1"]), (second + 1024, ["0", "1"])):
        path.write_bytes(data[:end])
        records, skips = indexed(path, tokenizer)
        assert [record.key for record in records] == (keys if end == second + 1024 else ["0"])
        assert "cut short" in skips[-1].reason
    path.write_bytes(gzip.compress(data))
    assert "compressed (gzip)" in indexed(path, tokenizer)[1][0].reason


def test_texts_alone_are_a_corpus(shard: Callable[[Members], Path], tokenizer: Tokenizer) -> None:
    path = shard([("a.txt", "one"), ("b.json", {"text": "two\0"})])

    records, skips = indexed(path, tokenizer)

    assert [texts_of(path, record) for record in records] == [[("one", True)], [("two\0", True)]]
    assert ([record.kind for record in records], skips) == (["text", "text"], [])


def test_changed_words_are_noticed(shard: Callable[[Members], Path], tokenizer: Tokenizer) -> None:
    path = shard([("a.jpg", JPEG), ("a.txt", "one word")])
    (record,), _ = indexed(path, tokenizer)
    data = path.read_bytes()
    path.write_bytes(data.replace(b"one word", b"two word"))
    with pytest.raises(SampleError, match=r"s.tar, sample a \(byte \d+\): changed since it was indexed"):
        texts_of(path, record)
    path.write_bytes(data.replace(b"one word", b"\xff\xfe word"))
    with pytest.raises(SampleError, match="not UTF-8"):
        texts_of(path, record)
    with pytest.raises(SampleError, match="no member where the index says"):
        texts_of(path, replace(record, offset=record.offset + 512))


def test_a_truncated_image_is_a_skipped_sample_when_it_is_read(
    shard: Callable[[Members], Path], tokenizer: Tokenizer
) -> None:
    noise = image_bytes(Image.effect_noise((60, 60), 90), "JPEG")
    path = shard([("a.jpg", noise[: len(noise) - 300]), ("a.txt", "a")])
    (record,), _ = indexed(path, tokenizer)
    reader = TarReader(DataFolder(str(path.parent)), StemLayout())

    failure = MediaReader(reader, VISION).load(plan_media(record.media[0], VISION)).failure

    assert failure is not None
    assert "truncated" in failure


def test_shards_at_a_url_are_read_by_ranges(tokenizer: Tokenizer) -> None:
    memory = fsspec.filesystem("memory")
    data = tar_bytes(MIXED)
    memory.pipe_file("/tars/s.tar", data)
    folder = DataFolder("memory://tars")
    requests: list[tuple[int, int]] = []

    def read_range(offset: int, num_bytes: int) -> bytes:
        requests.append((offset, num_bytes))
        return folder.read_range("s.tar", offset, num_bytes)

    indexer = TarIndexer("s.tar", ReadAhead(read_range, len(data)).read, len(data), StemLayout(), tokenizer)
    records = [each for each in indexer if isinstance(each, SampleRecord)]

    assert requests == [(0, len(data))]
    reader = TarReader(folder, StemLayout())
    assert [reader.read_words(record)[-1].text for record in records][-1] == "no picture here"
    assert MediaReader(reader, VISION).load(plan_media(records[0].media[0], VISION)).failure is None
    memory.rm("/tars", recursive=True)


def test_a_shard_larger_than_the_window_is_read_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(members, "READ_AHEAD_BYTES", 2048)
    data = bytes(range(256)) * 40
    fetched = 0

    def read_range(offset: int, num_bytes: int) -> bytes:
        nonlocal fetched
        fetched += num_bytes
        return data[offset : offset + num_bytes]

    ahead = ReadAhead(read_range, len(data))
    for offset in range(0, len(data), 500):
        assert ahead.read(offset, 500) == data[offset : offset + 500]
        back = max(offset - 700, 0)
        assert ahead.read(back, 300) == data[back : back + 300]
    assert fetched < 1.4 * len(data)


def test_reasons_quote_data_in_a_form_that_any_file_takes() -> None:
    facts = facts_of(["refers to \ud800\x1b[31m.jpg", "x" * 10**6])

    told = ShardInfo.parse(ShardInfo(name="s.tar", num_bytes=1, facts=facts).text(), 1).facts["left_out"]

    assert told == [r"refers to \ud800\x1b[31m.jpg", "x" * 500 + "…"]
