"""Files of conversations: indexed by stretches, read again to the same tokens; bad lines are skipped."""

import base64
import io
import json
from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from k25_train.data.chat import lines as lines_module
from k25_train.data.chat.chat_tokens import ChatTokens, Stretch
from k25_train.data.chat.indexer import ChatIndexer, Skipped
from k25_train.data.chat.lines import lines
from k25_train.data.chat.messages import parse_conversation
from k25_train.data.chat.reader import ChatReader
from k25_train.data.folder import DataFolder
from k25_train.data.formats.records import MediaSegment, SampleRecord, TextSegment
from k25_train.data.formats.sample_json import SampleError
from k25_train.data.formats.shard_reader import ShardReader
from k25_train.data.tokenizer import Tokenizer, load_tokenizer
from k25_train.errors import DataError
from tests.helpers.chat_goldens import goldens, write_kimi_vocabulary
from tests.helpers.tiny_shards import make_video


@pytest.fixture(scope="module")
def kimi(tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    return load_tokenizer(write_kimi_vocabulary(tmp_path_factory.mktemp("kimi") / "tiktoken.model"))


def png(width: int = 40, height: int = 20) -> bytes:
    buffer = io.BytesIO()
    Image.new("RGB", (width, height), (9, 90, 200)).save(buffer, "PNG")
    return buffer.getvalue()


def base64_png(width: int) -> str:
    return base64.b64encode(png(width, 10)).decode()


def asked(*parts: dict[str, Any]) -> bytes:
    """A conversation about media."""
    user = {"role": "user", "content": list(parts)}
    return json.dumps({"messages": [user, {"role": "assistant", "content": "Yes."}]}).encode()


def indexed(folder: Path, kimi: Tokenizer, name: str = "a.jsonl") -> tuple[list[SampleRecord], list[str]]:
    """Records of a file, and why lines are skipped."""
    indexer = ChatIndexer(DataFolder(str(folder)), ChatTokens(kimi, ""))
    found = list(indexer.index(name, 0, (folder / name).stat().st_size))
    records = [each for each in found if isinstance(each, SampleRecord)]
    return records, [f"{each.line}: {each.reason}" for each in found if isinstance(each, Skipped)]


def reader(folder: Path, kimi: Tokenizer) -> ChatReader:
    return ChatReader(ShardReader(DataFolder(str(folder))), ChatTokens(kimi, ""))


@pytest.mark.parametrize("cuts", [(), (1,), (7, 8, 9), range(1, 40)])
def test_stretches_give_each_line_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, cuts: Sequence[int]
) -> None:
    monkeypatch.setattr(lines_module, "_BLOCK_BYTES", 5)
    data = b"\xef\xbb\xbfab\n\ncdefghij\r\nklmnopqrstuvw\nx"
    (tmp_path / "a.jsonl").write_bytes(data)
    folder = DataFolder(str(tmp_path))
    bounds = [0, *(cut for cut in cuts if cut < len(data)), len(data)]
    found = [
        line
        for start, stop in pairwise(bounds)
        for line in lines(folder, "a.jsonl", start, stop, max_bytes=12)
    ]
    assert [line.data for line in found] == [b"ab", b"", b"cdefghij\r", None, b"x"]
    assert [line.offset for line in found] == [3, 6, 7, 17, 31]


def test_records_read_to_the_tokens_that_were_counted(tmp_path: Path, kimi: Tokenizer) -> None:
    texts = [golden for golden in goldens() if golden.name not in ("images", "video")]
    (tmp_path / "a.jsonl").write_bytes(b"\n".join(golden.line for golden in texts))
    records, skipped = indexed(tmp_path, kimi)
    tokens = ChatTokens(kimi, "")
    documents = [each for golden in texts for each in tokens.documents(parse_conversation(golden.line))]
    assert not skipped and len(records) == len(documents) == len(texts) + 2
    chat = reader(tmp_path, kimi)
    for record, document in zip(records, documents, strict=True):
        assert [
            (segment.num_tokens, segment.loss)
            for segment in record.segments
            if isinstance(segment, TextSegment)
        ] == [(len(part.tokens), part.learned) for part in document if isinstance(part, Stretch)]
        for number, part in enumerate(document):
            assert isinstance(part, Stretch)
            assert list(chat.segment_tokens(record, number, 0, len(part.tokens))) == list(part.tokens)
            assert list(chat.segment_tokens(record, number, 1, 2)) == list(part.tokens[1:2])


def test_media_are_found_next_to_the_file_by_url_and_in_the_line(tmp_path: Path, kimi: Tokenizer) -> None:
    folder = tmp_path / "set"
    (folder / "sub").mkdir(parents=True)
    (folder / "pictures").mkdir()
    (folder / "pictures" / "a b.PNG").write_bytes(png())
    (folder / "sub" / "v.mp4").write_bytes(make_video(32, 32, "mp4", 8, 4, seed=1).data)
    encoded = next(text for width in range(30, 99) if "/" in (text := base64_png(width)))
    uri = "data:image/png;base64," + encoded
    escaped = asked({"type": "image_url", "image_url": {"url": uri}}).replace(b"/", b"\\/")
    inner = base64.b64decode(encoded)
    named = asked(
        {"type": "image", "image": "../pictures/a b.PNG"},
        {"type": "image", "url": f"file://{folder}/pictures/a%20b.PNG"},
        {"type": "image_url", "image_url": f"{folder}/pictures/a b.PNG"},
        {"type": "video", "path": "v.mp4"},
    )
    (folder / "sub" / "a.jsonl").write_bytes(
        b"\n".join([named, escaped, asked({"type": "image", "url": uri})])
    )

    records, skipped = indexed(folder, kimi, "sub/a.jsonl")
    assert not skipped
    places = [[(m.shard, m.width, m.height, m.num_frames) for m in record.media] for record in records]
    picture = ("pictures/a b.PNG", 40, 20, 1)
    embedded = [("sub/a.jsonl", Image.open(io.BytesIO(inner)).width, 10, 1)]
    assert places == [[picture, picture, picture, ("sub/v.mp4", 32, 32, 8)], embedded, embedded]
    chat = reader(folder, kimi)
    for record, content in zip(records, (png(), inner, inner), strict=True):
        segment = record.media[0]
        assert chat.read(segment.shard, segment.offset, segment.num_bytes) == content
    # The line end behind an image is text of the template.
    kinds = [type(segment) for segment in records[1].segments]
    assert kinds == [TextSegment, MediaSegment, TextSegment, TextSegment]


@pytest.mark.parametrize(
    ("url", "reason"),
    [
        ("gone.png", "its image gone.png is not there (gone.png)"),
        ("../b.png", "its image ../b.png is outside of the source's folder"),
        ("https://example.com/b.png", "is outside of the source's folder"),
        ("/etc/passwd", "its image /etc/passwd is outside of the source's folder"),
        ("a.jsonl", "its image a.jsonl does not decode"),
        ("cut.png", "its image cut.png"),
        ("empty.png", "its image empty.png"),
        (".", "its image . cannot be used"),
        ("data:image/png,abc", "is a data: URI without Base64"),
        ("data:image/png;base64,", "is a data: URI that is empty"),
        ("data:image/png;base64,ab!d", "has a data: URI that is not Base64"),
        ("data:image/png;base64,abcd", "its image at byte"),
    ],
)
def test_media_that_cannot_be_used_are_told(tmp_path: Path, kimi: Tokenizer, url: str, reason: str) -> None:
    folder = tmp_path / "set"
    folder.mkdir()
    (folder / "cut.png").write_bytes(png()[:50])
    (folder / "empty.png").write_bytes(b"")
    (folder / "a.jsonl").write_bytes(b"\n" + asked({"type": "image", "image": url}) + b"\n")
    records, (skipped,) = indexed(folder, kimi)
    assert not records and skipped.startswith("2: ")
    assert reason in skipped


def test_bad_lines_are_skipped_by_number(tmp_path: Path, kimi: Tokenizer) -> None:
    good = asked({"type": "text", "text": "Is NUL\0 text?"})
    (tmp_path / "a.jsonl").write_bytes(
        b"\n".join([good, b"{", b"", b'{"a": "' + b"x" * 3000 + b'"}', good, b'"\xff"', good])
    )
    indexer = ChatIndexer(DataFolder(str(tmp_path)), ChatTokens(kimi, ""), max_line_bytes=2000)
    for cuts in ([], [1], [100, 300], range(1, 3500, 7)):
        bounds = [0, *cuts, 10**6]
        found = [each for bound in pairwise(bounds) for each in indexer.index("a.jsonl", *bound)]
        lines_found = [each.line if isinstance(each, Skipped) else 0 for each in found]
        assert lines_found == [0, 2, 4, 0, 6, 0]
        assert isinstance(found[2], Skipped) and "longer than 2000 bytes" in found[2].reason


def test_files_of_another_kind_are_refused(tmp_path: Path, kimi: Tokenizer) -> None:
    (tmp_path / "a.jsonl.gz").write_bytes(b"")
    with pytest.raises(DataError, match=r"a\.jsonl\.gz: conversations are JSON lines, uncompressed"):
        indexed(tmp_path, kimi, "a.jsonl.gz")


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ((b"Hello", b"Hallo"), "changed since it was indexed"),
        ((b'"role"', b'"rule"'), "has no `role`"),
        ((b'{"messages"', b'["messages"'), "is not valid JSON"),
    ],
)
def test_a_conversation_that_changed_is_told(
    tmp_path: Path, kimi: Tokenizer, change: tuple[bytes, bytes], reason: str
) -> None:
    (golden,) = (each for each in goldens() if each.name == "text")
    path = tmp_path / "a.jsonl"
    path.write_bytes(golden.line)
    ((record,), _) = indexed(tmp_path, kimi)
    path.write_bytes(golden.line.replace(*change))
    with pytest.raises(SampleError, match=f"a.jsonl, conversation at byte 0: .*{reason}"):
        reader(tmp_path, kimi).segment_tokens(record, 0, 0, 1)


def test_tokens_other_than_indexed_are_told(tmp_path: Path, kimi: Tokenizer) -> None:
    (golden,) = (each for each in goldens() if each.name == "text")
    (tmp_path / "a.jsonl").write_bytes(golden.line)
    ((record,), _) = indexed(tmp_path, kimi)
    other = SampleRecord(
        shard=record.shard,
        key="0",
        kind="text",
        source="",
        offset=record.offset,
        num_bytes=record.num_bytes,
        segments=(TextSegment(num_tokens=3, loss=True), *record.segments[1:]),
    )
    with pytest.raises(SampleError, match="its tokens are not those that were indexed"):
        reader(tmp_path, kimi).segment_tokens(other, 0, 0, 1)
