"""megatron-core's indexed data sets: PREFIX.bin with token ids, PREFIX.idx with the lengths of sequences.

Read from megatron-core 0.19.2's `core/datasets/indexed_dataset.py`. PREFIX.idx is, little-endian:

    "MMIDIDX\\0\\0", u64 version 1, u8 code of the ids' type, u64 S sequences, u64 D + 1 ends of documents
    i32 [S] lengths in tokens, i64 [S] first bytes in PREFIX.bin, i64 [D + 1] sequences before each document

and a multimodal set has an i8 [S] behind. The library's own reader is not used: it maps local files alone and
brings torch and megatron-core along, and only the index needs PREFIX.idx.
"""

import struct
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial

import numpy as np

from k25_train.data.formats.index_layout import ShardInfo
from k25_train.data.formats.index_writer import IndexWriter
from k25_train.data.formats.prepared import check_prepared
from k25_train.data.formats.records import SampleRecord
from k25_train.data.formats.sample_json import SampleError, Words
from k25_train.data.formats.shard_reader import ShardReader
from k25_train.data.formats.source_files import SourceFiles
from k25_train.data.formats.source_format import FormatSpec
from k25_train.data.formats.source_index import SourceIndex
from k25_train.data.tokenizer import Tokenizer
from k25_train.errors import DataError

_HEADER = struct.Struct("<9sQBQQ")
_MAGIC = b"MMIDIDX\0\0"
_TYPES = {1: "u1", 2: "i1", 3: "<i2", 4: "<i4", 5: "<i8", 8: "<u2"}
"""Codes of the whole-number types; 6 and 7 are floating-point numbers."""
CHUNK_DOCUMENTS = 1 << 19
"""Documents that are indexed at once: some 20 MB. Our choice."""
SAMPLED_DOCUMENTS = 64
"""Documents of each file, evenly spread, whose ids are looked at when it is indexed. Our choice."""
_SAMPLED_TOKENS = 1024


@dataclass(frozen=True, slots=True)
class _Layout:
    """Where the arrays of a PREFIX.idx are."""

    dtype: np.dtype
    num_sequences: int
    num_documents: int

    @property
    def lengths(self) -> int:
        return _HEADER.size

    @property
    def pointers(self) -> int:
        return self.lengths + 4 * self.num_sequences

    @property
    def documents(self) -> int:
        return self.pointers + 8 * self.num_sequences

    @property
    def num_bytes(self) -> int:
        return self.documents + 8 * (self.num_documents + 1)


def list_shards(files: SourceFiles) -> list[ShardInfo]:
    """Every PREFIX.bin that the path names."""
    return [files.info(name, has_checksums=False) for name in files.find((".bin",))]


def index_shard(files: SourceFiles, shard: ShardInfo, tokenizer: Tokenizer, writer: IndexWriter) -> None:
    """Add the documents of PREFIX.bin, without the [BOS] and [EOS] that they may have already.

    Raises DataError, naming the file, for one that is no such set, is cut short, was prepared with another
    tokenizer, or has ids that the vocabulary has not.
    """
    check_prepared(files, shard.name, tokenizer)
    layout = _read_layout(files, shard)
    has_bos, has_eos = _ends_of_documents(files, shard, layout, tokenizer)
    size = layout.dtype.itemsize
    facts = {"dtype": layout.dtype.str, "has_bos": has_bos, "has_eos": has_eos}
    writer.add_shard(replace(shard, facts=facts))
    for pointers, num_tokens in _documents(files, shard, layout):
        inner = num_tokens - has_bos - has_eos
        if len(inner) and inner.min() < 0:
            # An empty document has not even its end; it is skipped as empty.
            inner = np.maximum(inner, 0)
        writer.add_texts(pointers + size * has_bos, inner * size, inner)


def _read_layout(files: SourceFiles, shard: ShardInfo) -> _Layout:
    name = _idx(shard.name)
    where = f"{files.root}/{name}"
    found = files.folder.num_bytes(files.folder.check_name(name))
    magic, version, code, num_sequences, num_ends = _HEADER.unpack(
        files.folder.read_range(name, 0, _HEADER.size).ljust(_HEADER.size, b"\0")
    )
    if magic != _MAGIC or version != 1:
        raise DataError(
            f"{where}: is no index of megatron-core's (it begins with {magic!r}, version {version}). Name "
            "the "
            f"prefix of a .bin and .idx with {files.key}, or make them with `python -m k25_train.data "
            "prepare`."
        )
    if code not in _TYPES:
        raise DataError(
            f"{where}: its ids have type {code}, which is not of whole numbers. Tokenize it again."
        )
    layout = _Layout(np.dtype(_TYPES[code]), num_sequences, num_ends - 1)
    if num_sequences and found == layout.num_bytes + num_sequences:
        raise DataError(
            f"{where}: is a multimodal set of megatron-core's, whose modes are not read. Use tar shards "
            "(format: webdataset) for images."
        )
    if found != layout.num_bytes:
        raise DataError(
            f"{where}: has {found} bytes, {layout.num_bytes} are those of {num_sequences} sequences; it "
            "was cut "
            "short or is another file. Copy it again."
        )
    return layout


def _documents(
    files: SourceFiles, shard: ShardInfo, layout: _Layout
) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """First bytes and numbers of tokens of documents, a stretch at a time."""
    read = partial(_read_array, files, _idx(shard.name))
    where, size = f"{files.root}/{_idx(shard.name)}", layout.dtype.itemsize
    expected = 0
    for start in range(0, layout.num_documents, CHUNK_DOCUMENTS):
        count = min(CHUNK_DOCUMENTS, layout.num_documents - start)
        firsts = read(layout.documents + 8 * start, count + 1, "<i8")
        first, last = int(firsts[0]), int(firsts[-1])
        if (np.diff(firsts) < 0).any() or not 0 <= first <= last <= layout.num_sequences:
            raise DataError(f"{where}: its documents end before they begin. Tokenize it again.")
        lengths = read(layout.lengths + 4 * first, last - first, "<i4").astype(np.int64)
        pointers = read(layout.pointers + 8 * first, last - first, "<i8")
        before = np.concatenate([[0], np.cumsum(lengths)])
        if (lengths < 0).any() or not np.array_equal(pointers, expected + size * before[:-1]):
            raise DataError(
                f"{where}: its sequences do not follow one another in {shard.name}. Merge the set with "
                "megatron-core's tools, or tokenize it again."
            )
        places = before[firsts - first]
        yield expected + size * places[:-1], np.diff(places)
        expected += size * int(before[-1])
    if expected != shard.num_bytes:
        raise DataError(
            f"{files.root}/{shard.name}: has {shard.num_bytes} bytes, its .idx says {expected}; it was cut "
            "short "
            "or is another file. Copy both again."
        )


def _ends_of_documents(
    files: SourceFiles, shard: ShardInfo, layout: _Layout, tokenizer: Tokenizer
) -> tuple[bool, bool]:
    """Whether documents have a [BOS] and an [EOS] of their own, by a sample of them."""
    chosen = np.unique(np.linspace(0, layout.num_documents - 1, SAMPLED_DOCUMENTS).astype(np.int64))
    firsts_and_lasts = []
    for number in chosen[: layout.num_documents].tolist():
        first, stop = _read_array(files, _idx(shard.name), layout.documents + 8 * number, 2, "<i8").tolist()
        if not 0 <= first < stop <= layout.num_sequences:
            continue
        lengths = _read_array(files, _idx(shard.name), layout.lengths + 4 * first, stop - first, "<i4")
        (pointer,) = _read_array(files, _idx(shard.name), layout.pointers + 8 * first, 1, "<i8").tolist()
        count = int(lengths.sum())
        if count:
            head = _read_array(files, shard.name, pointer, min(count, _SAMPLED_TOKENS), layout.dtype.str)
            end = pointer + layout.dtype.itemsize * (count - 1)
            last = _read_array(files, shard.name, end, 1, layout.dtype.str)
            _check_ids(files, shard, number, np.concatenate([head, last]), tokenizer)
            firsts_and_lasts.append((int(head[0]), int(last[0])))
    has_bos = [first == tokenizer.bos for first, _ in firsts_and_lasts]
    has_eos = [last == tokenizer.eos for _, last in firsts_and_lasts]
    for name, found in (("begin with [BOS]", has_bos), ("end with [EOS]", has_eos)):
        if any(found) and not all(found):
            raise DataError(
                f"{files.root}/{shard.name}: {sum(found)} of {len(found)} documents looked at {name}, the "
                "others "
                "do not. Tokenize it again, all of it with or all of it without (Megatron-LM's --append-eod)."
            )
    return bool(has_bos) and all(has_bos), bool(has_eos) and all(has_eos)


def _check_ids(
    files: SourceFiles, shard: ShardInfo, document: int, ids: np.ndarray, tokenizer: Tokenizer
) -> None:
    if len(ids) and not 0 <= int(ids.min()) <= int(ids.max()) < tokenizer.vocab_size:
        raise DataError(
            f"{files.root}/{shard.name}, document {document}: has the ids {int(ids.min())} to "
            f"{int(ids.max())}, "
            f"the vocabulary those below {tokenizer.vocab_size}. It was tokenized with another one: set "
            "data.tokenizer to that, or tokenize it again with `python -m k25_train.data prepare`."
        )


def _read_array(files: SourceFiles, name: str, offset: int, count: int, dtype: str) -> np.ndarray:
    num_bytes = count * np.dtype(dtype).itemsize
    if not 0 <= offset <= offset + num_bytes < 1 << 63:
        raise DataError(
            f"{files.root}/{name.rpartition('.')[0]}.idx: has lengths or places that no file has. Copy it "
            "again, or tokenize the texts again."
        )
    data = files.folder.read_range(name, offset, num_bytes) if num_bytes else b""
    if len(data) != num_bytes:
        raise DataError(
            f"{files.root}/{name}: ends at byte {offset + len(data)}, where more tokens or lengths should "
            "be; it "
            "was cut short. Copy it again."
        )
    return np.frombuffer(data, dtype)


def _idx(name: str) -> str:
    return name.removesuffix(".bin") + ".idx"


class IndexedReader(ShardReader):
    """Reads ids straight from PREFIX.bin."""

    def __init__(self, files: SourceFiles, index: SourceIndex, tokenizer: Tokenizer) -> None:
        super().__init__(files.folder)
        self._index = index
        self._vocab_size, self._eos = tokenizer.vocab_size, tokenizer.eos

    def words(self, record: SampleRecord) -> Sequence[Words]:
        """See `SourceReader`: it has no pictures."""
        return ()

    def segment_tokens(self, record: SampleRecord, segment: int, start: int, stop: int) -> Sequence[int]:
        """See `SourceReader`. Raises SampleError for ids that the vocabulary has not."""
        facts = self._index.shard_named(record.shard).facts
        dtype = np.dtype(facts["dtype"])
        is_end = stop == record.num_text_tokens and stop > start
        more = int(is_end and facts["has_eos"])
        offset = record.offset + dtype.itemsize * start
        ids = np.frombuffer(self.read(record.shard, offset, dtype.itemsize * (stop - start + more)), dtype)
        if len(ids) and not 0 <= int(ids.min()) <= int(ids.max()) < self._vocab_size:
            raise SampleError(
                f"has ids from {int(ids.min())} to {int(ids.max())}, the vocabulary those below "
                f"{self._vocab_size}"
            )
        if is_end and (ids[-1] == self._eos) != facts["has_eos"]:
            wrong = "does not end" if facts["has_eos"] else "ends"
            raise SampleError(f"{wrong} with [EOS], unlike the documents that were looked at for the index")
        return ids[: stop - start].tolist()


INDEXED = FormatSpec(list_shards=list_shards, index_shard=index_shard, make_reader=IndexedReader)
