"""The items of a source: in memory, or those of an index file."""

from collections.abc import Sequence
from typing import Protocol

from k25_train.config.sources import SourceFormat
from k25_train.data.fingerprint import record_facts
from k25_train.data.formats.index_builder import index_of_records
from k25_train.data.formats.index_layout import HAS_LOSS, ShardInfo, SourceHeader
from k25_train.data.formats.records import SampleRecord
from k25_train.data.formats.shards import MOST_IN_MEMORY
from k25_train.data.formats.source_index import SourceIndex
from k25_train.data.mix.columns import ItemColumns
from k25_train.data.mix.documents import has_target

SEGMENTS_AT_ONCE = 2**20
"""Segments that are looked at before the next."""


class Items(Protocol):
    """Items of an index."""

    @property
    def columns(self) -> ItemColumns:
        """What planning knows of them."""

    def record(self, item: int) -> SampleRecord:
        """One of them."""

    def has_target(self, limit: int | None) -> bool:
        """Whether any of them, or of the first ones, has something to learn."""

    def facts(self, name: str, limit: int | None) -> dict[str, str]:
        """What is true of them, or of the first ones, under a dotted key (`fingerprint.py`)."""

    def index(self, tokenizer_sha256: str) -> SourceIndex:
        """The index that they are items of, counted with this vocabulary."""


class RecordItems:
    """Items in memory."""

    def __init__(self, records: Sequence[SampleRecord]) -> None:
        self.records = records
        self.columns = ItemColumns.of(records)

    def record(self, item: int) -> SampleRecord:
        """See `Items`."""
        return self.records[item]

    def has_target(self, limit: int | None) -> bool:
        """See `Items`."""
        return any(map(has_target, self.records[:limit]))

    def facts(self, name: str, limit: int | None) -> dict[str, str]:
        """See `Items`."""
        return record_facts(name, self.records[:limit])

    def index(self, tokenizer_sha256: str) -> SourceIndex:
        """See `Items`."""
        shards: dict[str, list[SampleRecord]] = {}
        for record in self.records:
            shards.setdefault(record.shard, []).append(record)
        header = SourceHeader(format="shards", tokenizer_sha256=tokenizer_sha256)
        infos = [(ShardInfo(name=name, num_bytes=_end_of(of)), of) for name, of in shards.items()]
        return index_of_records(header, infos)


class IndexItems:
    """Items of an index file: those of a split, or all."""

    def __init__(self, index: SourceIndex, first: int, stop: int) -> None:
        self._index = index
        self._first, self._stop = first, stop
        self.columns = ItemColumns.of_index(index, first, stop)

    def record(self, item: int) -> SampleRecord:
        """See `Items`."""
        return self._index.record(self._first + item)

    def has_target(self, limit: int | None) -> bool:
        """See `Items`. Looks at segments until one has a loss, which the first does as a rule."""
        segments = self._index.first_segment
        if segments is None:
            return True
        stop = self._stop if limit is None else min(self._stop, self._first + limit)
        begin, end = int(segments[self._first]), int(segments[stop])
        return any(
            bool((self._index.segments[at : min(at + SEGMENTS_AT_ONCE, end)] & HAS_LOSS).any())
            for at in range(begin, end, SEGMENTS_AT_ONCE)
        )

    def facts(self, name: str, limit: int | None) -> dict[str, str]:
        """See `Items`: what the header says, which costs nothing. A shard set that might be in memory has the
        facts that it has there, so that a run goes on when it gets an index."""
        header = self._index.header
        if header.format == SourceFormat.shards.value and len(self._index) < MOST_IN_MEMORY:
            stop = self._stop if limit is None else min(self._stop, self._first + limit)
            return record_facts(name, [self._index.record(item) for item in range(self._first, stop)])
        used = "" if limit is None else f", the first {limit}"
        items = f"items {self._first} to {self._stop} of {header.num_items}{used}"
        told = f"{items}, {header.num_tokens} text tokens"
        content = {f"{name}.content": f"sha256 {header.content_sha256[:32]}"} if header.content_sha256 else {}
        return {name: f"{told}, sha256 {header.sizes_sha256[:32]}", **content}

    def index(self, tokenizer_sha256: str) -> SourceIndex:
        """See `Items`."""
        return self._index


def _end_of(records: Sequence[SampleRecord]) -> int:
    """A size that a shard has at least."""
    ends = [record.offset + record.num_bytes for record in records]
    return max(ends + [each.offset + each.num_bytes for record in records for each in record.media])
