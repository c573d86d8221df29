"""`k25-data prepare`: the result is megatron-core's form of the texts in order, however it came about."""

import bz2
import gzip
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from random import Random

import pyarrow as pa  # type: ignore[import-untyped]
import pyarrow.parquet as pq  # type: ignore[import-untyped]
import pytest

from k25_train.data.prepare import tokenize as tokenizing
from k25_train.data.prepare.job import Preparation
from k25_train.data.tokenizer import load_tokenizer
from k25_train.errors import MachineError
from tests.helpers.project_sources import REPO
from tests.helpers.text_corpus import (
    files_of,
    prepare,
    read_documents,
    texts,
    write_lines,
    write_tokenizer,
)

TEXTS = texts(120)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Both tokenizers, and a corpus in two files."""
    folder = tmp_path_factory.mktemp("corpus")
    write_tokenizer(folder / "tokenizer.json")
    write_tokenizer(folder / "tiktoken.model")
    write_lines(folder / "a.jsonl", TEXTS[:70])
    write_lines(folder / "b.jsonl", TEXTS[70:])
    return folder


@pytest.fixture(scope="module")
def expected(folder: Path) -> dict[str, bytes]:
    """Files of one shard, made in this process without an interruption."""
    prepare([folder / "a.jsonl", folder / "b.jsonl"], folder / "expected" / "c", folder / "tokenizer.json")
    return files_of(folder / "expected")


@pytest.mark.parametrize(("name", "dtype"), [("tokenizer.json", "uint16"), ("tiktoken.model", "int32")])
def test_megatron_opens_it_and_finds_the_documents(
    folder: Path, tmp_path: Path, name: str, dtype: str
) -> None:
    from megatron.core.datasets.indexed_dataset import DType, IndexedDataset

    prepare([folder / "a.jsonl"], tmp_path / "c", folder / name)
    tokenizer = load_tokenizer(folder / name)
    found = IndexedDataset(str(tmp_path / "c-00000"))
    assert [found[i].tolist() for i in range(len(found))] == tokenizer.encode_batch(TEXTS[:70])
    assert found.document_indices.tolist() == list(range(71))
    assert found.index.dtype == DType.optimal_dtype(tokenizer.vocab_size)
    assert found.index.dtype.__name__ == dtype
    assert (tmp_path / "c-00000.idx").stat().st_size == 34 + 70 * 20 + 8


def test_megatron_writes_the_same_bytes(folder: Path, tmp_path: Path) -> None:
    import torch
    from megatron.core.datasets.indexed_dataset import DType, IndexedDatasetBuilder

    prepare([folder / "a.jsonl"], tmp_path / "c", folder / "tokenizer.json", append_eod=True)
    tokenizer = load_tokenizer(folder / "tokenizer.json")
    builder = IndexedDatasetBuilder(str(tmp_path / "m.bin"), DType.optimal_dtype(tokenizer.vocab_size))
    for ids in tokenizer.encode_batch(TEXTS[:70]):
        builder.add_item(torch.tensor([*ids, tokenizer.eos]))
        builder.end_document()
    builder.finalize(str(tmp_path / "m.idx"))
    for suffix in (".bin", ".idx"):
        assert (tmp_path / f"m{suffix}").read_bytes() == (tmp_path / f"c-00000{suffix}").read_bytes()


def test_workers_and_units_leave_no_trace(folder: Path, tmp_path: Path, expected: dict[str, bytes]) -> None:
    inputs = [folder / "a.jsonl", folder / "b.jsonl"]
    prepare(inputs, tmp_path / "two" / "c", folder / "tokenizer.json", num_workers=2)
    assert files_of(tmp_path / "two") == expected
    for unit_bytes in (177, 10**9):
        prepare(inputs, tmp_path / str(unit_bytes) / "c", folder / "tokenizer.json", unit_bytes=unit_bytes)
        found = files_of(tmp_path / str(unit_bytes))
        for name in ("c-00000.bin", "c-00000.idx"):
            assert found[name] == expected[name], (unit_bytes, name)


def test_shards_end_between_documents(folder: Path, tmp_path: Path, expected: dict[str, bytes]) -> None:
    whole = read_documents(folder / "expected" / "c-00000")
    result = prepare(
        [folder / "a.jsonl", folder / "b.jsonl"], tmp_path / "c", folder / "tokenizer.json", shard_tokens=500
    )
    shards = [read_documents(tmp_path / name) for name in result.record["shards"]]
    assert [ids for shard in shards for ids in shard] == whole
    sizes = [sum(map(len, shard)) for shard in shards]
    assert all(size <= 500 or len(shard) == 1 for size, shard in zip(sizes, shards, strict=True))
    # No shard has room for what begins the next one.
    assert all(sizes[i] + len(shards[i + 1][0]) > 500 for i in range(len(shards) - 1))
    one = prepare([folder / "a.jsonl"], tmp_path / "one", folder / "tokenizer.json", shard_tokens=1)
    assert len(one.record["shards"]) == 70


def zstd(data: bytes) -> bytes:
    """Compressed in two frames, as `cat a.zst b.zst` has them."""
    half = len(data) // 2
    return b"".join(pa.compress(part, "zstd", asbytes=True) for part in (data[:half], data[half:]))


@pytest.mark.parametrize(
    ("suffix", "compress"), [("gz", gzip.compress), ("bz2", bz2.compress), ("zst", zstd)]
)
def test_compressed_lines(
    folder: Path, tmp_path: Path, expected: dict[str, bytes], suffix: str, compress: Callable[[bytes], bytes]
) -> None:
    (tmp_path / "in").mkdir()
    for name in ("a", "b"):
        data = (folder / f"{name}.jsonl").read_bytes()
        (tmp_path / "in" / f"{name}.jsonl.{suffix}").write_bytes(compress(data))
    (tmp_path / "in" / "_SUCCESS").touch()
    prepare([tmp_path / "in"], tmp_path / "out" / "c", folder / "tokenizer.json")
    assert files_of(tmp_path / "out")["c-00000.bin"] == expected["c-00000.bin"]


@pytest.mark.parametrize("kind", [pa.string(), pa.large_string(), pa.dictionary(pa.int32(), pa.string())])
def test_parquet(folder: Path, tmp_path: Path, expected: dict[str, bytes], kind: pa.DataType) -> None:
    table = pa.table({"other": list(range(120)), "text": pa.array(TEXTS).cast(kind)})
    pq.write_table(table, tmp_path / "t.parquet", row_group_size=7)
    prepare([tmp_path / "t.parquet"], tmp_path / "out" / "c", folder / "tokenizer.json", num_workers=2)
    assert files_of(tmp_path / "out")["c-00000.idx"] == expected["c-00000.idx"]
    assert files_of(tmp_path / "out")["c-00000.bin"] == expected["c-00000.bin"]


def test_a_url_and_a_glob(folder: Path, tmp_path: Path, expected: dict[str, bytes]) -> None:
    import fsspec  # type: ignore[import-untyped]

    memory = fsspec.filesystem("memory")
    for name in ("a", "b"):
        memory.pipe_file(f"/corpus/{name}.jsonl", (folder / f"{name}.jsonl").read_bytes())
    prepare(["memory://corpus/*.jsonl"], tmp_path / "url" / "c", folder / "tokenizer.json", unit_bytes=300)
    prepare([folder / "[ab].jsonl"], tmp_path / "glob" / "c", folder / "tokenizer.json")
    for where in ("url", "glob"):
        assert files_of(tmp_path / where)["c-00000.bin"] == expected["c-00000.bin"]


@pytest.mark.parametrize("name", ["tokenizer.json", "tiktoken.model"])
def test_a_long_document_is_encoded_in_parts(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    text = " ".join(texts(300, seed=1)) + "x" * 30_000 + " " * 30_000
    inputs = [write_lines(tmp_path / "long.jsonl", ["before", text, "behind"])]
    monkeypatch.setattr(tokenizing, "LONG_CHARACTERS", 10_000)
    monkeypatch.setattr(tokenizing, "BATCH_CHARACTERS", 4000)
    prepare(inputs, tmp_path / "c", folder / name, append_eod=True)
    tokenizer = load_tokenizer(folder / name)
    encoded = tokenizer.encode_batch(["before", text, "behind"])
    assert read_documents(tmp_path / "c-00000") == [[*ids, tokenizer.eos] for ids in encoded]
    # A shard holds what fits it exactly.
    room = len(encoded[0]) + len(encoded[1]) + 2
    options = {"append_eod": True, "shard_tokens": room, "unit_bytes": 10**9}
    exact = prepare(inputs, tmp_path / "e", folder / name, **options)
    assert len(exact.record["shards"]) == 2 and len(read_documents(tmp_path / "e-00000")) == 2


def test_a_corpus_of_one_document(folder: Path, tmp_path: Path) -> None:
    (tmp_path / "one.jsonl").write_text('{"text": "only \\u0000 one"}')
    result = prepare([tmp_path / "one.jsonl"], tmp_path / "out" / "c", folder / "tokenizer.json")
    assert result.record["num_documents"] == 1
    tokenizer = load_tokenizer(folder / "tokenizer.json")
    assert read_documents(tmp_path / "out" / "c-00000") == [tokenizer.encode("only \0 one")]


def test_it_goes_on_where_it_was(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Interrupted after each unit and each shard in turn; what is done is not done again."""
    inputs = [folder / "a.jsonl", folder / "b.jsonl"]
    prepare(inputs, tmp_path / "whole" / "c", folder / "tokenizer.json", shard_tokens=800)
    done: list[object] = []
    work = Preparation._work

    def interrupted(self: Preparation, task: object, report: Callable[[object], None]) -> object:
        if len(done) % 3 == 2:
            done.append(None)
            raise KeyboardInterrupt
        done.append(task)
        return work(self, task, report)  # type: ignore[arg-type]

    monkeypatch.setattr(Preparation, "_work", interrupted)
    for _ in range(100):
        try:
            prepare(inputs, tmp_path / "out" / "c", folder / "tokenizer.json", shard_tokens=800)
            break
        except KeyboardInterrupt:
            assert not (tmp_path / "out" / "c.json").exists()
    assert files_of(tmp_path / "out") == files_of(tmp_path / "whole")
    tasks = [str(task) for task in done if task is not None]
    assert len(tasks) == len(set(tasks)) and None in done
    assert sum("Shard" in task for task in tasks) > 3
    assert prepare(inputs, tmp_path / "out" / "c", folder / "tokenizer.json", shard_tokens=800).existed


def test_parts_that_lost_their_tokens_are_made_again(
    folder: Path, tmp_path: Path, expected: dict[str, bytes], monkeypatch: pytest.MonkeyPatch
) -> None:
    """As after a power failure: the record of a part is there, its tokens are cut short."""
    inputs = [folder / "a.jsonl", folder / "b.jsonl"]

    def fail(*_: object) -> None:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr("k25_train.data.prepare.job.write_shard", fail)
        with pytest.raises(MachineError, match=r"No space(.|\n)*goes on"):
            prepare(inputs, tmp_path / "out" / "c", folder / "tokenizer.json")
    parts = sorted((tmp_path / "out").rglob("*.tokens"))
    parts[0].unlink()
    os.truncate(parts[1], 2)
    prepare(inputs, tmp_path / "out" / "c", folder / "tokenizer.json")
    assert files_of(tmp_path / "out") == expected


def stamp(path: Path) -> int:
    """When a file was written; 0 if it is not there."""
    return path.stat().st_mtime_ns if path.exists() else 0


@pytest.mark.parametrize("num_kills", [2, pytest.param(40, marks=pytest.mark.slow)])
def test_killed_at_any_moment(
    folder: Path, tmp_path: Path, expected: dict[str, bytes], num_kills: int
) -> None:
    out = tmp_path / "out"
    command = [sys.executable, "-m", "k25_train.data", "prepare", folder / "a.jsonl", folder / "b.jsonl"]
    command += ["--out", out / "c", "--tokenizer", folder / "tokenizer.json"]
    command += ["--unit-bytes", "2000", "--max-skipped", "0", "--workers", "2"]
    rng = Random(num_kills)
    for _ in range(num_kills):
        before = stamp(out / "c.prepare" / "lock.json")
        process = subprocess.Popen(command, cwd=REPO, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE)
        # Its beginning takes most of the time; what counts is what comes after.
        while process.poll() is None and stamp(out / "c.prepare" / "lock.json") == before:
            time.sleep(0.002)
        time.sleep(rng.expovariate(20))
        process.send_signal(signal.SIGKILL)
        error = process.communicate()[1].decode()
        assert process.returncode in (0, -signal.SIGKILL), error
        if (out / "c.json").exists():
            assert (out / "c-00000.bin").read_bytes() == expected["c-00000.bin"]
            shutil.rmtree(out)
    subprocess.run(command, cwd=REPO, check=True, stdout=subprocess.DEVNULL)
    found = files_of(out)
    assert found["c-00000.bin"] == expected["c-00000.bin"] and found["c-00000.idx"] == expected["c-00000.idx"]
    assert found.keys() == expected.keys()
