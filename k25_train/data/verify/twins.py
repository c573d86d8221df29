"""Samples of one source that have the same name, and those that are the same.

Many corpora number the samples of every tar from 0, so that a name says nothing beyond its file: there equal
names are told as a warning for each pair of files. A sample that is there again, with its name and every
checksum, is a fault. Indexes leave out what has a name twice in one file.
"""

from collections.abc import Iterator, Sequence

import numpy as np

from k25_train.data.formats.source_index import SourceIndex
from k25_train.data.verify.shard_faults import Fault, ShardCheck

LISTED_TWINS = 100
"""Samples, and pairs of files, that are told one by one; more are counted. Our choice."""


class Twins:
    """Compares all samples of a source by hashes: 16 bytes of each, and what sorting them takes."""

    def __init__(self, source: str, index: SourceIndex, checks: Sequence[ShardCheck]) -> None:
        """`checks`: of every file, in the order of the index."""
        self._source, self._index = source, index
        empty = np.zeros(0, np.uint64)
        keys = np.concatenate([empty, *(check.keys for check in checks)])
        contents = np.concatenate([empty, *(check.contents for check in checks)])
        items, same, first = np.arange(len(keys)), _first(keys, contents), _first(keys)
        self._is_same = same < items
        self._first = np.where(self._is_same, same, first)
        self._is_other = (first < items) & ~self._is_same

    def faults(self) -> Iterator[Fault]:
        """Samples that are there again."""
        found = np.flatnonzero(self._is_same)
        for item in found[:LISTED_TWINS].tolist():
            record = self._index.record(item)
            first = self._index.record(int(self._first[item]))
            reason = f"is the same as the sample at byte {first.offset} of {first.shard}"
            yield Fault(self._source, record.shard, record.key, record.offset, reason)
        if len(found) > LISTED_TWINS:
            more = f"and other files have {len(found) - LISTED_TWINS} more samples twice"
            yield Fault(self._source, self._index.shard(0).name, "", 0, more)

    def warnings(self) -> Iterator[str]:
        """Pairs of files with equal names of other samples."""
        items = np.flatnonzero(self._is_other)
        shards = self._index.columns["shard"]
        pairs = np.stack([shards[self._first[items]], shards[items]])
        found, counts = np.unique(pairs, axis=1, return_counts=True)
        for (first, second), count in zip(found.T[:LISTED_TWINS].tolist(), counts.tolist(), strict=False):
            names = f"{self._index.shard(first).name} and {self._index.shard(second).name}"
            yield f"{self._source}: {names} have {count} names in common, of different samples"
        if len(counts) > LISTED_TWINS:
            yield f"{self._source}: and {len(counts) - LISTED_TWINS} more pairs of files have"


def _first(*columns: np.ndarray) -> np.ndarray:
    """[n]: of each item the first one that is equal in all columns, perhaps itself."""
    items = np.arange(len(columns[0]))
    order = np.lexsort(columns)
    begins = np.ones(len(items), np.bool_)
    begins[1:] = np.logical_or.reduce([each[order][1:] != each[order][:-1] for each in columns])
    found = np.empty_like(items)
    # The sort is stable, so the first of equal ones is the earliest.
    found[order] = order[np.maximum.accumulate(np.where(begins, items, 0))]
    return found
