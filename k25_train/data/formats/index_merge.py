"""Merges indexes into one file, column by column and stretch by stretch, whatever their size.

The file depends on the items alone, not on how they were cut into parts.
"""

import hashlib
import os
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from k25_train.data.formats.index_layout import (
    COLUMNS,
    HAS_LOSS,
    ShardInfo,
    SourceHeader,
    aligned,
    encode_prefix,
    item_size,
)
from k25_train.data.formats.left_out import joined
from k25_train.data.formats.source_index import SourceIndex
from k25_train.errors import DataError

_CHUNK = 1 << 20
"""Values of a column that are merged at once."""
_NO_HASH = "0" * 64
_COUNTED = {
    "first_segment": "segments",
    "first_media": "media_offset",
    "frame_times_end": "frame_times",
    "key_end": "keys",
}
"""Column of places -> the one whose values they count."""


def write_index(path: Path, parts: Sequence[SourceIndex | Path]) -> SourceHeader:
    """Write one index of the items of `parts`, in their order; splits are those of its shards.

    At least one part; all of one format and tokenizer. A shard may be in several parts, one behind the other.
    Raises DataError, naming them, where they do not fit, or if a split's shards do not follow one another.
    """
    merge = _Merge(parts)
    partial = path.with_name(f"{path.name}.{os.getpid()}.partial")
    try:
        header = merge.write(partial)
        os.replace(partial, path)
    except OSError as error:
        raise DataError(
            f"{path}: the index cannot be written ({error}). Give it another place with "
            "data.sources.NAME.index, or make room."
        ) from error
    finally:
        partial.unlink(missing_ok=True)
    return header


class _Merge:
    """Parts and what each adds to the numbers of those behind it."""

    def __init__(self, parts: Sequence[SourceIndex | Path]) -> None:
        self._parts = parts
        self._shards: dict[str, int] = {}
        self._infos: list[ShardInfo] = []
        self._formats: dict[str, int] = {}
        self._lengths = dict.fromkeys(COLUMNS, 0)
        self._is_plain, self._has_keys, self._has_checksums = True, False, False
        self._has_kinds = False
        spans: list[tuple[str, int]] = []
        headers = []
        for part in parts:
            index = _opened(part)
            headers.append(index.header)
            self._count(index, spans)
        self._header = _merged_header(headers, _splits(spans))

    def _count(self, index: SourceIndex, spans: list[tuple[str, int]]) -> None:
        for shard in index.shards():
            if shard.name not in self._shards:
                self._shards[shard.name] = len(self._shards)
                self._infos.append(shard)
            elif shard.facts:
                number = self._shards[shard.name]
                facts = joined(self._infos[number].facts, shard.facts)
                self._infos[number] = replace(self._infos[number], facts=facts)
        for name in index.header.media_formats:
            self._formats.setdefault(name, len(self._formats))
        self._is_plain &= index.first_segment is None
        self._has_keys |= "key_end" in index.columns
        self._has_kinds |= "kind" in index.columns
        self._has_checksums |= "crc32" in index.columns
        of_items = index.columns["shard"]
        start = 0
        while start < len(of_items):
            number = of_items[start]
            stop = int(np.searchsorted(of_items, number, side="right"))
            if stop <= start:
                raise DataError(f"{index.path}: items of a shard do not follow one another. Index it again.")
            spans.append((index.shard(int(number)).split, stop - start))
            start = stop

    def write(self, path: Path) -> SourceHeader:
        texts = [shard.text() for shard in self._infos]
        fixed = {
            "shard_bytes": np.array([shard.num_bytes for shard in self._infos], "<u8"),
            "shard_text_end": np.cumsum([len(text) for text in texts], dtype="<u8"),
            "shard_text": np.frombuffer(b"".join(texts), np.uint8),
        }
        absent = self._absent()
        header = replace(
            self._header,
            num_shards=len(self._infos),
            media_formats=tuple(self._formats),
            sizes_sha256=_NO_HASH,
            content_sha256=_NO_HASH if self._has_checksums else "",
        )
        digests: dict[str, Any] = {"sizes": hashlib.sha256(), "content": hashlib.sha256()}
        places: dict[str, tuple[int, int]] = {}
        sizes = {name: self._length(name, fixed) for name in COLUMNS if name not in absent}
        first = 0
        for name, count in sizes.items():
            places[name] = (first, count)
            first = aligned(first + count * item_size(name))
        start = len(encode_prefix(header, places))
        with open(path, "wb") as file:
            for name in sizes:
                file.seek(start + places[name][0])
                digest = hashlib.sha256()
                for values in [fixed[name]] if name in fixed else self._values(name):
                    data = np.ascontiguousarray(values, COLUMNS[name].dtype)
                    file.write(data.data)
                    digest.update(data.data)
                if COLUMNS[name].hashed:
                    digests[COLUMNS[name].hashed].update(f"{name} {digest.hexdigest()}\n".encode())
            file.truncate(start + first)
            header = replace(
                header,
                sizes_sha256=digests["sizes"].hexdigest(),
                content_sha256=digests["content"].hexdigest() if self._has_checksums else "",
            )
            file.seek(0)
            file.write(encode_prefix(header, places))
            file.flush()
            os.fsync(file.fileno())
        return header

    def _absent(self) -> set[str]:
        absent = set() if self._has_keys else {"keys", "key_end"}
        absent |= set() if self._has_kinds else {"kind"}
        absent |= set() if self._has_checksums else {"crc32", "media_crc32"}
        absent |= {"first_segment", "segments"} if self._is_plain else set()
        if not self._header.num_media:
            absent |= {"first_media", "frame_times", "frame_times_end"}
            absent |= {name for name in COLUMNS if name.startswith("media_")}
        return absent

    def _length(self, name: str, fixed: dict[str, np.ndarray]) -> int:
        per = COLUMNS[name].per
        if name in fixed:
            return len(fixed[name])
        if per.what == "item":
            return self._header.num_items + per.extra
        if per.what == "media":
            return self._header.num_media
        return sum(_own_length(_opened(part), name) for part in self._parts)

    def _values(self, name: str) -> Iterator[np.ndarray]:
        """The values of a column in all parts, one stretch after the other."""
        base = 0
        if COLUMNS[name].per.extra:
            yield np.zeros(1, "<u8")
        for part in self._parts:
            index = _opened(part)
            change: Callable[..., Any] = np.asarray
            if name in ("shard", "media_shard"):
                change = np.array([self._shards[shard.name] for shard in index.shards()], "<u4").take
            elif name == "media_format":
                change = np.array([self._formats[each] for each in index.header.media_formats], "u1").take
            elif name in ("first_segment", "first_media", "frame_times_end", "key_end"):
                change = np.uint64(base).__add__
                base += _own_length(index, _COUNTED[name])
            for values in _chunks(index, name):
                yield change(values)


def _own_length(index: SourceIndex, name: str) -> int:
    if name in index.columns:
        return len(index.columns[name])
    return len(index) if name == "segments" else 0


def _chunks(index: SourceIndex, name: str) -> Iterator[np.ndarray]:
    """A part's values of a column, with those that it leaves out because they say nothing."""
    column = COLUMNS[name]
    count = {"item": len(index), "media": index.header.num_media}.get(
        column.per.what, _own_length(index, name)
    )
    stored = index.columns.get(name)
    if stored is not None and column.per.extra:
        stored = stored[1:]
    for start in range(0, count, _CHUNK):
        stop = min(start + _CHUNK, count)
        if stored is not None:
            yield stored[start:stop]
        elif name == "first_segment":
            yield np.arange(start + 1, stop + 1, dtype="<u8")
        elif name == "segments":
            yield index.text_tokens[start:stop] | np.uint32(HAS_LOSS)
        else:
            yield np.zeros(stop - start, column.dtype)


def _opened(part: SourceIndex | Path) -> SourceIndex:
    # Ten thousands of parts are not held open: each takes a descriptor and a mapping.
    return SourceIndex.open(part) if isinstance(part, Path) else part


def _merged_header(headers: Sequence[SourceHeader], splits: dict[str, tuple[int, int]]) -> SourceHeader:
    first = headers[0]
    for other in headers[1:]:
        for name in ("format", "tokenizer_sha256", "frame", "facts"):
            if getattr(other, name) != getattr(first, name):
                raise DataError(
                    f"parts of an index differ in their {name}: {getattr(first, name)} and "
                    f"{getattr(other, name)}. Index the source again with --force."
                )
    return replace(
        first,
        num_items=sum(each.num_items for each in headers),
        num_tokens=sum(each.num_tokens for each in headers),
        num_media=sum(each.num_media for each in headers),
        splits=splits,
    )


def _splits(spans: Sequence[tuple[str, int]]) -> dict[str, tuple[int, int]]:
    """Split -> first item and the one after its last, from the splits of stretches of items."""
    found: dict[str, tuple[int, int]] = {}
    position, last = 0, ""
    for split, count in spans:
        if split in found and split != last:
            raise DataError(f"shards of split {split!r} do not follow one another. Sort shards by split.")
        first = found[split][0] if split in found else position
        position, last = position + count, split
        found[split] = (first, position)
    return {} if set(found) <= {""} else found
