"""What is wrong with a corpus, an argument or a disk is a counted skip with its place, or a named error."""

import errno
import gzip
import json
import os
import signal
from collections.abc import Callable
from pathlib import Path

import pyarrow as pa  # type: ignore[import-untyped]
import pyarrow.parquet as pq  # type: ignore[import-untyped]
import pytest

from k25_train.data.prepare import documents, lines
from k25_train.data.prepare.documents import records
from k25_train.data.prepare.inputs import find_inputs
from k25_train.data.prepare.job import Preparation
from k25_train.data.prepare.lock import locked
from k25_train.data.prepare.parts import PartWriter
from k25_train.data.prepare.units import cut
from k25_train.data.tokenizer import Tokenizer, load_tokenizer
from k25_train.errors import DataError, MachineError
from tests.helpers.text_corpus import prepare, read_documents, texts, write_lines, write_tokenizer

GOOD = b'{"text": "good"}\n'
BAD_LINES = {
    b'{"text": "\xff"}': "not UTF-8",
    b'{"text": "a"': "not JSON",
    b"[" * 100_000: "not JSON",
    b'{"n": ' + b"9" * 5000 + b"}": "not JSON",
    b'["text"]': "no JSON object",
    b'{"content": "a"}': "field missing",
    b'{"text": 3}': "field is no string",
    b'{"text": null}': "field is no string",
    b'{"text": ""}': "empty text",
    b'{"text": "\\ud83d"}': "half of a surrogate pair",
    b"\x00\x01": "not JSON",
}


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tokenizer's file."""
    return write_tokenizer(tmp_path_factory.mktemp("tokenizer") / "tokenizer.json")


@pytest.fixture
def out(tmp_path: Path) -> Path:
    """Prefix of the result."""
    return tmp_path / "out" / "c"


def test_bad_lines_are_skipped_with_their_place(tmp_path: Path, tokenizer: Path, out: Path) -> None:
    path = tmp_path / "bad.jsonl"
    path.write_bytes(
        b"\xef\xbb\xbf" + GOOD + b"\n \t\r\n" + b"".join(line + b"\n" + GOOD for line in BAD_LINES)
    )
    result = prepare([path], out, tokenizer, max_skipped=len(BAD_LINES), unit_bytes=5000)
    assert result.record["num_documents"] == len(BAD_LINES) + 1
    assert sum(result.record["skipped"].values()) == len(BAD_LINES)
    found = result.record["skipped_examples"]
    for number, reason in enumerate(list(BAD_LINES.values())[: len(found)]):
        assert found[number].startswith(f"{path}:{4 + 2 * number}: {reason}"), found[number]
    assert set(map(tuple, read_documents(out.with_name("c-00000")))) == {
        tuple(load_tokenizer(tokenizer).encode("good"))
    }


@pytest.mark.parametrize("line", BAD_LINES)
def test_each_bad_line_ends_a_command_that_allows_none(
    tmp_path: Path, tokenizer: Path, out: Path, line: bytes
) -> None:
    (tmp_path / "bad.jsonl").write_bytes(GOOD + line + b"\n")
    with pytest.raises(DataError, match="--max-skipped") as error:
        prepare([tmp_path / "bad.jsonl"], out, tokenizer)
    assert f"bad.jsonl:2: {BAD_LINES[line]}" in str(error.value)
    assert not list(out.parent.glob("*.bin"))
    # What was done is kept, and the limit may be raised.
    assert prepare([tmp_path / "bad.jsonl"], out, tokenizer, max_skipped=0.5).record["num_documents"] == 1


def test_a_last_line_that_is_cut(tmp_path: Path, tokenizer: Path, out: Path) -> None:
    (tmp_path / "cut.jsonl").write_bytes(GOOD * 3 + GOOD[:-6])
    result = prepare([tmp_path / "cut.jsonl"], out, tokenizer, max_skipped=1)
    assert result.record["skipped"] == {"last line cut short": 1}
    (tmp_path / "whole.jsonl").write_bytes(GOOD * 3 + GOOD[:-1])
    assert prepare([tmp_path / "whole.jsonl"], f"{out}2", tokenizer).record["num_documents"] == 4


def test_a_line_beyond_the_limit_is_not_held(
    tmp_path: Path, tokenizer: Path, out: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(lines, "MAX_LINE_BYTES", 1000)
    monkeypatch.setattr(lines, "_READ_BYTES", 64)
    (tmp_path / "long.jsonl").write_bytes(GOOD + b"x" * 5000 + b"\n" + GOOD)
    for unit_bytes in (10**6, 100):
        result = prepare(
            [tmp_path / "long.jsonl"], f"{out}{unit_bytes}", tokenizer, max_skipped=1, unit_bytes=unit_bytes
        )
        assert result.record["num_documents"] == 2 and result.record["skipped"] == {"too long": 1}


def test_every_cut_gives_every_line_once(tmp_path: Path) -> None:
    path = write_lines(tmp_path / "a.jsonl", texts(8))
    path.write_bytes(b"\n\n" + path.read_bytes() + b"\n" + GOOD[:-1])
    files = find_inputs([str(path)], "text", "")
    whole = [r.text for unit in cut(files, 10**9) for r in records(files[0], unit, "text", "")]
    for unit_bytes in (1, 2, 3, 50):
        units = cut(files, unit_bytes)
        assert [r.text for unit in units for r in records(files[0], unit, "text", "")] == whole


def test_rows_that_are_no_text(tmp_path: Path, tokenizer: Path, out: Path) -> None:
    values = [b"a", None, b"", b"\xff", b"b"]
    pq.write_table(
        pa.table({"text": pa.array(values, pa.binary())}), tmp_path / "t.parquet", row_group_size=2
    )
    result = prepare([tmp_path / "t.parquet"], out, tokenizer, max_skipped=3)
    assert result.record["skipped"] == {"empty text": 1, "field is no string": 1, "not UTF-8": 1}
    assert result.record["skipped_examples"][2].startswith(f"{tmp_path / 't.parquet'}, row 3: not UTF-8")


def test_duplicate_ids(tmp_path: Path, tokenizer: Path, out: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("k25_train.data.prepare.duplicates.IDS_AT_ONCE", 7)
    ids = [1, "1", 2, 1, 3, "1", 4, 4, 4, 5] * 2
    path = tmp_path / "a.jsonl"
    path.write_text("".join(json.dumps({"i": i, "text": f"t{n}"}) + "\n" for n, i in enumerate(ids)))
    result = prepare([path], out, tokenizer, max_skipped=0.9, id_field="i", unit_bytes=60, shard_tokens=6)
    assert result.record["skipped"] == {"duplicate id": 14} and result.record["num_documents"] == 6
    encode = load_tokenizer(tokenizer).encode
    shards = [read_documents(out.with_name(name)) for name in result.record["shards"]]
    assert [ids for shard in shards for ids in shard] == [encode(f"t{n}") for n in (0, 1, 2, 4, 6, 9)]


def write(name: str, data: bytes) -> Callable[[Path], str]:
    """Makes an input of these bytes."""

    def make(folder: Path) -> str:
        (folder / name).write_bytes(data)
        return str(folder / name)

    return make


def other_column(folder: Path) -> str:
    """A Parquet file whose text has another name."""
    pq.write_table(pa.table({"content": ["a"]}), folder / "t.parquet")
    return str(folder / "t.parquet")


def numbers(folder: Path) -> str:
    """A Parquet file whose text is none."""
    pq.write_table(pa.table({"text": [1]}), folder / "t.parquet")
    return str(folder / "t.parquet")


def damaged_pages(folder: Path) -> str:
    """A Parquet file with a sound footer and zeros for its data."""
    path = Path(numbers(folder))
    pq.write_table(pa.table({"text": texts(50)}), path)
    data = bytearray(path.read_bytes())
    data[4:400] = bytes(396)
    path.write_bytes(data)
    return str(path)


BAD_INPUTS: dict[str, tuple[Callable[[Path], str], str]] = {
    "absent": (lambda folder: str(folder / "no.jsonl"), "no such file"),
    "empty folder": (str, "is in this folder"),
    "no match": (lambda folder: f"{folder}/*.jsonl", "no file matches"),
    "unknown scheme": (lambda folder: "nowhere://a", "cannot be opened"),
    "empty": (write("a.jsonl", b""), "is empty"),
    "blank": (write("a.jsonl", b"\n\n \n"), "no document"),
    "array": (write("a.json", b' [{"text": "a"}]'), "jq -c"),
    "UTF-16": (write("a.jsonl", '{"text": "a"}'.encode("utf-16")), "UTF-16"),
    "xz": (write("a.jsonl.xz", b"\xfd7zXZ\x00"), "zstd or gzip"),
    "zip": (write("a.jsonl", b"PK\x03\x04"), "unpack"),
    "gzip cut short": (write("a.jsonl.gz", gzip.compress(GOOD * 10_000)[:-30]), "cut short"),
    "gzip damaged": (write("a.jsonl.gz", gzip.compress(os.urandom(999))[:50] + b"x" * 999), "damaged"),
    "no Parquet": (write("a.parquet", b"hello"), "does not begin as Parquet"),
    "Parquet cut short": (write("a.parquet", b"PAR1" + bytes(100)), "cannot be read as Parquet"),
    "other column": (other_column, "Its columns are content"),
    "numbers": (numbers, "int64, not strings"),
    "damaged pages": (damaged_pages, "Restore it"),
    "all fields missing": (write("a.jsonl", b'{"content": "a"}\n' * 500), "--field"),
}


@pytest.mark.parametrize("name", BAD_INPUTS)
@pytest.mark.parametrize("num_workers", [0, 1])
def test_bad_inputs_are_named(
    tmp_path: Path, tokenizer: Path, out: Path, name: str, num_workers: int
) -> None:
    make, text = BAD_INPUTS[name]
    given = make(tmp_path)
    with pytest.raises(DataError, match=text) as error:
        prepare([given], out, tokenizer, num_workers=num_workers)
    assert given.rstrip("*") in str(error.value) or name == "blank"


def test_an_input_twice(tmp_path: Path, tokenizer: Path, out: Path) -> None:
    write_lines(tmp_path / "a.jsonl", ["a"])
    with pytest.raises(DataError, match="named twice"):
        prepare([tmp_path, tmp_path / "a.jsonl"], out, tokenizer)


def test_an_input_that_changes(
    tmp_path: Path, tokenizer: Path, out: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = write_lines(tmp_path / "a.jsonl", texts(20))
    write = documents.lines

    def changed(*arguments: object) -> object:
        with path.open("a", encoding="utf-8") as file:
            file.write('{"text": "more"}\n')
        return write(*arguments)  # type: ignore[arg-type]

    monkeypatch.setattr(documents, "lines", changed)
    with pytest.raises(DataError, match="has changed since"):
        prepare([path], out, tokenizer, unit_bytes=200)


def test_output_that_is_of_others_is_left_alone(tmp_path: Path, tokenizer: Path, out: Path) -> None:
    one, two = write_lines(tmp_path / "one.jsonl", ["a"]), write_lines(tmp_path / "two.jsonl", ["b"])
    prepare([one], out, tokenizer)
    before = out.with_name("c-00000.bin").read_bytes()
    other = tokenizer.with_name("other.json")
    other.write_bytes(tokenizer.read_bytes() + b"\n")
    for inputs, vocabulary, options, text in (
        ([two], tokenizer, {}, "two.jsonl is not one of the 1 inputs"),
        ([one], other, {}, "--tokenizer is another file"),
        ([one], tokenizer, {"append_eod": True}, "--append-eod is True, there False"),
        ([one], tokenizer, {"shard_tokens": 5}, "--shard-tokens is 5"),
    ):
        with pytest.raises(DataError, match="--restart") as error:
            prepare(inputs, out, vocabulary, **options)  # type: ignore[arg-type]
        assert text in str(error.value)
        assert out.with_name("c-00000.bin").read_bytes() == before
    prepare([two, one], out, tokenizer, restart=True)
    assert len(read_documents(out.with_name("c-00000"))) == 2
    out.with_name("c-00000.idx").unlink()
    with pytest.raises(DataError, match=r"c-00000\.idx: is missing"):
        prepare([two, one], out, tokenizer)
    foreign = tmp_path / "foreign"
    foreign.mkdir()
    (foreign / "text-00000.bin").write_bytes(b"mine")
    for restart in (False, True):
        with pytest.raises(DataError, match="Choose another --out"):
            prepare([one], f"{foreign}/", tokenizer, restart=restart)
    assert (foreign / "text-00000.bin").read_bytes() == b"mine"


def test_two_at_once(tmp_path: Path, tokenizer: Path, out: Path) -> None:
    path = write_lines(tmp_path / "a.jsonl", ["a"])
    with locked(out.with_name("c.prepare")), pytest.raises(DataError, match="is being prepared by process"):
        prepare([path], out, tokenizer)
    prepare([path], out, tokenizer)


@pytest.mark.parametrize("num_workers", [0, 2])
def test_a_full_disk(
    tmp_path: Path, tokenizer: Path, out: Path, monkeypatch: pytest.MonkeyPatch, num_workers: int
) -> None:
    path = write_lines(tmp_path / "a.jsonl", texts(30))

    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(PartWriter, "add", full)
        with pytest.raises(MachineError, match="No space"):
            prepare([path], out, tokenizer, num_workers=num_workers)
    left = [each.name for each in out.parent.rglob("*") if each.is_file()]
    assert not [name for name in left if name.endswith((".done", ".tokens", ".bin"))]
    assert prepare([path], out, tokenizer).record["num_documents"] == 30


def test_a_worker_that_is_killed_is_named(
    tmp_path: Path, tokenizer: Path, out: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = write_lines(tmp_path / "a.jsonl", texts(30))
    with monkeypatch.context() as patch:
        patch.setattr(Preparation, "_work", lambda *_: os.kill(os.getpid(), signal.SIGKILL))
        with pytest.raises(MachineError, match="signal 9"):
            prepare([path], out, tokenizer, num_workers=2)
    assert prepare([path], out, tokenizer, num_workers=2).record["num_documents"] == 30


def test_a_text_that_the_tokenizer_cannot_have(
    tmp_path: Path, tokenizer: Path, out: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = write_lines(tmp_path / "a.jsonl", ["a", "boom", "b"])
    kind = type(load_tokenizer(tokenizer))
    encode = kind.encode_batch

    def failing(self: Tokenizer, batch: list[str]) -> list[list[int]]:
        if "boom" in batch:
            raise RuntimeError("panicked")
        return encode(self, batch)  # type: ignore[arg-type]

    monkeypatch.setattr(kind, "encode_batch", failing)
    result = prepare([path], out, tokenizer, max_skipped=1)
    assert result.record["skipped"] == {"not encoded": 1} and result.record["num_documents"] == 2


@pytest.mark.parametrize("name", ["absent.json", "words.txt", "empty.json"])
def test_a_wrong_tokenizer(tmp_path: Path, out: Path, name: str) -> None:
    path = write_lines(tmp_path / "a.jsonl", ["a"])
    (tmp_path / "words.txt").touch()
    (tmp_path / "empty.json").write_text("{}")
    with pytest.raises(DataError, match=name):
        prepare([path], out, tmp_path / name)
    with pytest.raises(DataError, match="must be a local path"):
        prepare([path], "s3://bucket/x", tmp_path / name)
