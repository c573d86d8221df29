"""megatron-core's .bin and .idx, indexed by `k25-data index` and read in place."""

import os
import random
import shutil
import struct
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import fsspec  # type: ignore[import-untyped]
import numpy as np
import pytest

from k25_train.config.data import DataConfig
from k25_train.config.sources import SourceConfig, SourceFormat
from k25_train.data.commands import indexing
from k25_train.data.commands.indexing import index_source
from k25_train.data.formats import indexed, source_files
from k25_train.data.formats.index_builder import IndexBuilder
from k25_train.data.formats.index_layout import ShardInfo, SourceHeader
from k25_train.data.formats.index_merge import write_index
from k25_train.data.formats.index_prefix import IndexFileError, MissingIndexError
from k25_train.data.formats.sample_json import SampleError
from k25_train.data.formats.source_files import SourceFiles
from k25_train.data.formats.source_index import SourceIndex
from k25_train.data.open_source import Source, StaleIndexError, open_source
from k25_train.data.tokenizer import Tokenizer, load_tokenizer
from k25_train.errors import DataError
from tests.helpers.tiny_shards import Sample, tiny_data_config, write_shard_set

NUM_DOCUMENTS = 40
Documents = list[list[list[int]]]
"""Sequences of ids of each document."""


@pytest.fixture(scope="module")
def vocabulary(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("set")
    return write_shard_set(folder, {"train": [Sample("a", "text", ["red"])]}) / "tokenizer.json"


@pytest.fixture
def tokenizer(vocabulary: Path) -> Tokenizer:
    return load_tokenizer(vocabulary)


def write_set(prefix: Path, documents: Documents, code: int = 4) -> None:
    """A set as megatron-core's `IndexedDatasetBuilder` writes it."""
    dtype = np.dtype(indexed._TYPES.get(code, "<f4"))
    lengths = [len(sequence) for document in documents for sequence in document]
    ends = np.cumsum([0] + [len(document) for document in documents])
    pointers = np.cumsum([0, *lengths])[:-1] * dtype.itemsize
    tokens = [token for document in documents for sequence in document for token in sequence]
    Path(f"{prefix}.bin").write_bytes(np.array(tokens, dtype).tobytes())
    Path(f"{prefix}.idx").write_bytes(
        struct.pack("<9sQBQQ", b"MMIDIDX\0\0", 1, code, len(lengths), len(ends))
        + np.array(lengths, "<i4").tobytes() + pointers.astype("<i8").tobytes() + ends.astype("<i8").tobytes()
    )  # fmt: skip


def make_documents(seed: int, tail: list[int]) -> Documents:
    """Documents of one or several sequences, some empty."""
    rng = random.Random(seed)
    found: Documents = []
    for _ in range(NUM_DOCUMENTS):
        ids = [rng.randrange(200) for _ in range(rng.randint(1, 30))] + tail
        cut = rng.randrange(len(ids))
        found.append([ids[:cut], ids[cut:]] if rng.random() < 0.5 else [ids])
    return found


def joined(document: list[list[int]]) -> list[int]:
    """All ids of a document."""
    return [token for sequence in document for token in sequence]


def data_of(folder: Path | str, vocabulary: Path, path: str = "part_*") -> DataConfig:
    sources = {"web": SourceConfig(format=SourceFormat.indexed, path=path)}
    return replace(tiny_data_config(Path("/")), dir=str(folder), tokenizer=str(vocabulary), sources=sources)


def build(data: DataConfig, *, workers: int = 0, force: bool = False) -> bool:
    """Index the source; whether there was something to do."""
    return index_source("web", data, str(data.tokenizer), workers, lambda *_: None, force=force) is not None


def tokens_of(source: Source, item: int) -> list[int]:
    record = source.index.record(item)
    return list(source.reader.segment_tokens(record, 0, 0, record.num_text_tokens))


@pytest.mark.parametrize("code", [4, 5, 8])
@pytest.mark.parametrize("ends", [False, True])
def test_documents_are_read_without_their_ends(
    tmp_path: Path, vocabulary: Path, tokenizer: Tokenizer, code: int, ends: bool,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    monkeypatch.setattr(indexed, "CHUNK_DOCUMENTS", 7)
    sets = [make_documents(seed, [tokenizer.eos] * ends) for seed in range(3)]
    for number, documents in enumerate(sets):
        write_set(tmp_path / f"part_{number}", documents, code)
    data = data_of(tmp_path, vocabulary)
    assert build(data)
    source = open_source("web", data, tokenizer, checks_shards=True)

    expected = [joined(document) for documents in sets for document in documents]
    expected = [ids[:-1] if ends else ids for ids in expected]
    assert [tokens_of(source, item) for item in range(len(source.index))] == expected
    record = source.index.record(5)
    stretch = source.reader.segment_tokens(record, 0, 1, record.num_text_tokens)
    assert list(stretch) == expected[5][1:]
    assert source.index.header.frame and source.items_of("train") == (0, 3 * NUM_DOCUMENTS)
    with pytest.raises(DataError, match="has no split 'heldout'"):
        source.items_of("heldout")
    assert not build(data), "nothing has changed"


def test_indexing_goes_on_after_an_interruption(
    tmp_path: Path, vocabulary: Path, tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch
) -> None:
    for number in range(4):
        write_set(tmp_path / f"part_{number}", make_documents(number, []))
    data, done = data_of(tmp_path, vocabulary), []
    index_part = indexing.index_part

    def counted(name: str, data: DataConfig, path: str, shard: source_files.ShardInfo, part: Path) -> None:
        if len(done) == 2:
            done.append("")
            raise KeyboardInterrupt
        index_part(name, data, path, shard, part)
        done.append(shard.name)

    monkeypatch.setattr(indexing, "index_part", counted)
    with pytest.raises(KeyboardInterrupt):
        build(data)
    with pytest.raises(MissingIndexError, match=r"index data=NAME --source web"):
        open_source("web", data, tokenizer, checks_shards=False)
    assert build(data)
    assert done == ["part_0.bin", "part_1.bin", "", "part_2.bin", "part_3.bin"]
    place = Path(SourceFiles("web", data).index)
    first = place.read_bytes()
    assert not place.with_name(place.name + ".parts").exists()

    monkeypatch.setattr(indexing, "index_part", index_part)
    assert build(data, force=True)
    assert place.read_bytes() == first


@pytest.mark.slow
def test_processes_index_what_one_does(tmp_path: Path, vocabulary: Path) -> None:
    for number in range(4):
        write_set(tmp_path / f"part_{number}", make_documents(number, []))
    data = data_of(tmp_path, vocabulary)
    place = Path(SourceFiles("web", data).index)
    assert build(data)
    first = place.read_bytes()
    assert build(data, workers=2, force=True)
    assert place.read_bytes() == first


def _replace_bin(folder: Path) -> None:
    data = (folder / "part_0.bin").read_bytes()
    (folder / "part_0.bin").write_bytes(data[::-1])
    os.utime(folder / "part_0.bin", (1, 1))


STALE: dict[str, tuple[Callable[[Path], object], str]] = {
    "cut": (
        lambda folder: os.truncate(folder / "part_0.bin", 40),
        "part_0.bin: has 40 bytes but had .* it was cut short",
    ),
    "replaced": (_replace_bin, "part_0.bin: was written since it was indexed"),
    "gone": (lambda folder: (folder / "part_0.bin").unlink(), "part_0.bin: no such file"),
}


@pytest.mark.parametrize(("change", "message"), STALE.values(), ids=STALE.keys())
def test_one_rank_notices_files_that_changed(
    tmp_path: Path, vocabulary: Path, tokenizer: Tokenizer, change: Callable[[Path], object], message: str
) -> None:
    for number in range(2):
        write_set(tmp_path / f"part_{number}", make_documents(number, []))
    data = data_of(tmp_path, vocabulary)
    build(data)
    change(tmp_path)
    with pytest.raises(DataError, match=message) as raised:
        open_source("web", data, tokenizer, checks_shards=True)
    assert "`python -m k25_train.data index data=NAME --source web`" in str(raised.value)
    assert len(open_source("web", data, tokenizer, checks_shards=False).index) == 2 * NUM_DOCUMENTS


def test_index_of_another_vocabulary_or_format_is_refused(
    tmp_path: Path, vocabulary: Path, tokenizer: Tokenizer
) -> None:
    write_set(tmp_path / "part_0", make_documents(0, []))
    data = data_of(tmp_path, vocabulary)
    build(data)
    other = replace(data.sources["web"], index=SourceFiles("web", data).index, format=SourceFormat.chat)
    with pytest.raises(StaleIndexError, match=r"is an index of format indexed, .*format is chat"):
        indexing.open_index(SourceFiles("web", replace(data, sources={"web": other})), tokenizer, None)
    tokenizer.sha256 = "1" * 64
    with pytest.raises(StaleIndexError, match=r"counted with vocabulary \w+…, this is 111111111111…"):
        open_source("web", data, tokenizer, checks_shards=False)


def _edit_idx(folder: Path, edit: Callable[[bytes], bytes]) -> None:
    path = folder / "part_0.idx"
    path.write_bytes(edit(path.read_bytes()))


def write_idx_place(prefix: Path, place: int) -> None:
    write_set(prefix, [[[1, 2, 3]]])
    _edit_idx(prefix.parent, lambda data: data[:38] + struct.pack("<q", place) + data[46:])


def _link_idx(folder: Path) -> None:
    shutil.move(folder / "part_0.idx", folder.parent / "elsewhere.idx")
    (folder / "part_0.idx").symlink_to(folder.parent / "elsewhere.idx")


BAD: dict[str, tuple[Callable[[Path, Tokenizer], object], str]] = {
    "no idx": (lambda folder, _: (folder / "part_0.idx").unlink(), "part_0.idx"),
    "other magic": (
        lambda folder, _: _edit_idx(folder, lambda data: b"X" + data[1:]),
        "no index of megatron",
    ),
    "idx cut": (lambda folder, _: _edit_idx(folder, lambda data: data[:-8]), "was cut short"),
    "multimodal": (
        lambda folder, _: _edit_idx(folder, lambda data: data + bytes(struct.unpack_from("<Q", data, 18)[0])),
        "is a multimodal set",
    ),
    "floats": (
        lambda folder, _: _edit_idx(folder, lambda data: data[:17] + b"\7" + data[18:]),
        "type 7, which is not",
    ),
    "bin cut": (lambda folder, _: os.truncate(folder / "part_0.bin", 40), "cut short"),
    "ids": (
        lambda folder, tokenizer: write_set(folder / "part_0", [[[1, tokenizer.vocab_size, 3]]]),
        "document 0: has the ids 1 to 320, the vocabulary those below 320",
    ),
    "a length below zero": (
        lambda folder, _: _edit_idx(folder, lambda data: data[:34] + b"\xff" * 4 + data[38:]),
        r"part_0\.idx: (has lengths or places|its sequences do not follow)",
    ),
    "a place that is none": (
        lambda folder, _: write_idx_place(folder / "part_0", 2**63 - 1),
        r"part_0\.idx: has lengths or places that no file has",
    ),
    "idx elsewhere": (lambda folder, _: _link_idx(folder), "is a link to .*outside of its shard set"),
    "some end": (
        lambda folder, tokenizer: write_set(folder / "part_0", [[[1, tokenizer.eos]], [[2]]]),
        r"1 of 2 documents looked at end with \[EOS\], the others do not",
    ),
}


@pytest.mark.parametrize(("break_", "message"), BAD.values(), ids=BAD.keys())
def test_what_cannot_be_indexed_is_named(
    tmp_path: Path, vocabulary: Path, tokenizer: Tokenizer, break_: Callable[[Path, Tokenizer], object],
    message: str,
) -> None:  # fmt: skip
    write_set(tmp_path / "part_0", make_documents(0, []))
    break_(tmp_path, tokenizer)
    with pytest.raises(DataError, match=message):
        build(data_of(tmp_path, vocabulary))


def test_documents_unlike_those_looked_at_are_skipped(
    tmp_path: Path, vocabulary: Path, tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(indexed, "SAMPLED_DOCUMENTS", 2)
    write_set(
        tmp_path / "part_0", [[[1, tokenizer.eos]], [[2, 3]], [[4, 999, tokenizer.eos]], [[5, tokenizer.eos]]]
    )
    data = data_of(tmp_path, vocabulary)
    build(data)
    source = open_source("web", data, tokenizer, checks_shards=True)
    assert tokens_of(source, 0) == [1] and tokens_of(source, 3) == [5]
    with pytest.raises(SampleError, match=r"does not end with \[EOS\]"):
        tokens_of(source, 1)
    with pytest.raises(SampleError, match="has ids from 4 to 999"):
        tokens_of(source, 2)


def test_a_source_and_its_index_may_be_at_a_url(
    tmp_path: Path, vocabulary: Path, tokenizer: Tokenizer
) -> None:
    write_set(tmp_path / "part_0", make_documents(0, []))
    fs = fsspec.filesystem("memory")
    fs.put(str(tmp_path), "/corpus", recursive=True)
    data = replace(data_of("memory://corpus", vocabulary), cache_dir=str(tmp_path / "cache"))
    assert build(data)
    source = open_source("web", data, tokenizer, checks_shards=True)
    assert [tokens_of(source, item) for item in range(3)] == [
        joined(document) for document in make_documents(0, [])[:3]
    ]
    # The copy is made once, and again when the index has changed.
    copies = set((tmp_path / "cache").rglob("*.k25index"))
    open_source("web", data, tokenizer, checks_shards=False)
    assert set((tmp_path / "cache").rglob("*.k25index")) == copies and len(copies) == 1


def test_paths_name_prefixes_globs_and_braces(tmp_path: Path, vocabulary: Path) -> None:
    for name in ("a_000", "a_001", "b_000"):
        write_set(tmp_path / name, [[[1]]])

    def found(path: str) -> list[str]:
        return SourceFiles("web", data_of(tmp_path, vocabulary, path)).find((".bin",))

    assert found("a_000") == found("a_000.bin") == ["a_000.bin"]
    assert found("a_*") == found("a_{000..001}") == found("a_*.bin") == ["a_000.bin", "a_001.bin"]
    assert found("{a,b}_000") == ["a_000.bin", "b_000.bin"]
    with pytest.raises(DataError, match="there is no file"):
        found("c_*")
    places = {
        SourceFiles("web", data_of(tmp_path, vocabulary, path)).index for path in ("a_*", "a_?", "a_{1}")
    }
    assert len(places) == 3
    for path, told in (("{0..99999999}", "more than"), ("a_{0", "not closed")):
        with pytest.raises(DataError, match=rf"data\.sources\.web\.path=.*{told}"):
            found(path)
    shutil.rmtree(tmp_path)


def test_a_set_of_nothing_is_no_error_next_to_others(tmp_path: Path, vocabulary: Path) -> None:
    write_set(tmp_path / "part_0", [])
    write_set(tmp_path / "part_1", [[[1, 2, 3]]])
    assert build(data_of(tmp_path, vocabulary))


def test_an_index_of_files_elsewhere_is_refused(
    tmp_path: Path, vocabulary: Path, tokenizer: Tokenizer
) -> None:
    write_set(tmp_path / "secret", [[[1, 2, 3]]])
    data = data_of(tmp_path / "set", vocabulary)
    facts = {"dtype": "<i4", "has_bos": False, "has_eos": False}
    shard = ShardInfo(name="../secret.bin", num_bytes=12, has_checksums=False, facts=facts)
    builder = IndexBuilder(SourceHeader(format="indexed", tokenizer_sha256=tokenizer.sha256))
    builder.add_shard(shard)
    builder.add_texts(np.array([0]), np.array([12]), np.array([3]))
    (tmp_path / "set").mkdir()
    write_index(Path(SourceFiles("web", data).index), [builder.build()])

    with pytest.raises(DataError, match=r"names a file '\.\./secret\.bin'"):
        open_source("web", data, tokenizer, checks_shards=True)


def test_splits_that_overlap_are_refused(tmp_path: Path, tokenizer: Tokenizer) -> None:
    header = SourceHeader(format="indexed", tokenizer_sha256=tokenizer.sha256)
    builder = IndexBuilder(header)
    for split in ("train", "heldout"):
        builder.add_shard(ShardInfo(name=split, num_bytes=12, has_checksums=False, split=split))
        builder.add_texts(np.array([0]), np.array([12]), np.array([3]))
    write_index(tmp_path / "a.k25index", [builder.build()])
    assert SourceIndex.open(tmp_path / "a.k25index").header.splits == {"train": (0, 1), "heldout": (1, 2)}

    data = (tmp_path / "a.k25index").read_bytes()
    for wrong in (b"[0, 2]", b"[2, 3]"):
        (tmp_path / "a.k25index").write_bytes(data.replace(b"[1, 2]", wrong))
        with pytest.raises(IndexFileError, match=r"its splits .* overlap or are of no items"):
            SourceIndex.open(tmp_path / "a.k25index")
