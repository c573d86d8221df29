"""Writes an index of any number of items with bounded memory: as parts, which are merged at the end.

Parts are whole index files, so several processes may write them, and those that were written before an
interruption are kept (`commands/indexing.py`).
"""

import shutil
from collections.abc import Mapping
from dataclasses import replace
from functools import partial
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import numpy as np

from k25_train.data.formats.index_builder import IndexBuilder
from k25_train.data.formats.index_layout import ShardInfo, SourceHeader
from k25_train.data.formats.index_merge import write_index
from k25_train.data.formats.records import SampleRecord
from k25_train.errors import DataError

ROWS_IN_MEMORY = 1 << 19
"""Items, segments and media that are collected before they are written: some 30 MB. Our choice."""


class IndexWriter:
    """Context manager that writes one index. It appears under its name only when the block ends without an
    error; until then parts of it lie in `<name>.parts`."""

    def __init__(
        self, path: Path, header: SourceHeader, *, keeps_keys: bool = False, keeps_kinds: bool = False
    ) -> None:
        """`header`: format, tokenizer, frame and facts of the source; counts are filled in. What is kept of
        each item: see `IndexBuilder`."""
        self._path = path
        self._new_builder = partial(IndexBuilder, header, keeps_keys=keeps_keys, keeps_kinds=keeps_kinds)
        self._folder = path.with_name(path.name + ".parts")
        self._parts: list[Path] = []
        self._shards: dict[str, ShardInfo] = {}
        self._builder = self._new_builder()
        self.num_items = 0
        """Items added so far."""
        self._facts: dict[str, Mapping[str, Any]] = {}

    def __enter__(self) -> Self:
        return self

    def add_shard(self, shard: ShardInfo) -> None:
        """Begin the next file; items added from here on lie in it."""
        if shard.name in self._shards:
            raise DataError(f"{shard.name}: is twice among the files of a source. Name each file once.")
        self._shards[shard.name] = shard
        self._builder.add_shard(shard)

    def has_shard(self, name: str) -> bool:
        """Whether a file was added: media may lie in files of their own, which are added before their
        item."""
        return name in self._shards

    def add_facts(self, name: str, facts: Mapping[str, Any]) -> None:
        """Facts of a file that was added, as they turn out when its items are known."""
        self._facts[name] = facts

    def add(self, record: SampleRecord) -> None:
        """Add an item of the current shard. Raises what `IndexBuilder.add` does."""
        self._builder.add(record)
        self.num_items += 1
        self._spill()

    def add_texts(self, offsets: np.ndarray, num_bytes: np.ndarray, num_tokens: np.ndarray) -> None:
        """Add many texts of the current shard; see `IndexBuilder.add_texts`."""
        for start in range(0, len(offsets), ROWS_IN_MEMORY):
            chosen = slice(start, start + ROWS_IN_MEMORY)
            self._builder.add_texts(offsets[chosen], num_bytes[chosen], num_tokens[chosen])
            self._spill()
        self.num_items += len(offsets)

    def _spill(self) -> None:
        if self._builder.num_rows >= ROWS_IN_MEMORY:
            self._begin_part({})

    def _begin_part(self, facts: Mapping[str, Mapping[str, Any]]) -> None:
        """Write what there is; the next part has these facts of shards, to be added to those of the first."""
        self._folder.mkdir(parents=True, exist_ok=True)
        part = self._folder / f"{len(self._parts):06d}"
        write_index(part, [self._builder.build()])
        self._parts.append(part)
        self._builder = self._new_builder()
        # Media of later items may lie in any shard so far.
        for shard in self._shards.values():
            self._builder.add_shard(replace(shard, facts=facts.get(shard.name, {})))

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if kind is None:
            if self._facts:
                self._begin_part(self._facts)
            write_index(self._path, [*self._parts, self._builder.build()])
        if self._parts:
            shutil.rmtree(self._folder, ignore_errors=True)
