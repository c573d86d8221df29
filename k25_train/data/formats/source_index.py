"""The index of one source: what planning knows of its samples, as arrays that all ranks of a node share.

`SourceIndex.open` maps a file (`index_layout.py`), which costs the same whatever its number of items; small
sets have the same arrays in memory (`index_builder.py`). Planning takes what it needs from the columns of
many items at once; a `SampleRecord` is made of the few samples that a rank reads.
"""

import mmap
import os
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np

from k25_train.config.sources import SAMPLE_KINDS
from k25_train.data.formats.index_layout import (
    COLUMNS,
    HAS_LOSS,
    IS_MEDIA,
    PREFIX,
    TOKENS,
    ShardInfo,
    SourceHeader,
    item_size,
)
from k25_train.data.formats.index_prefix import (
    INDEX_AGAIN,
    MALFORMED,
    IndexFileError,
    MissingIndexError,
    check_counts,
    no_index,
    parse_prefix,
)
from k25_train.data.formats.limits import check_place
from k25_train.data.formats.records import MEDIA_TYPES, MediaSegment, SampleRecord, Segment, TextSegment
from k25_train.errors import DataError


@dataclass(frozen=True, eq=False)
class SourceIndex:
    """Header and columns of an index. Safe across threads and forks."""

    header: SourceHeader
    columns: Mapping[str, np.ndarray]
    """Name (`index_layout.COLUMNS`) -> array; those that say nothing are absent."""
    path: str = "an index in memory"
    """Where it is, for messages."""
    source: str = ""
    """Name of the source in the configuration, which its records bear."""
    _shards: dict[int, ShardInfo] = field(default_factory=dict)
    """Those asked for so far."""
    _by_name: dict[str, ShardInfo] = field(default_factory=dict)
    """The same by name."""

    @classmethod
    def open(cls, path: str | Path, source: str = "") -> "SourceIndex":
        """Map an index file.

        Raises MissingIndexError if there is none, and IndexFileError, naming it, for a file that is no index,
        of another version, or cut short.
        """
        try:
            with open(path, "rb") as file:
                num_bytes = os.fstat(file.fileno()).st_size
                if num_bytes < PREFIX.size:
                    raise no_index(path, f"it has {num_bytes} bytes")
                mapped = mmap.mmap(file.fileno(), num_bytes, access=mmap.ACCESS_READ)
                if hasattr(mmap, "MADV_RANDOM"):
                    # Windows read blocks all over the file, where reading ahead is in vain.
                    mapped.madvise(mmap.MADV_RANDOM)
        except FileNotFoundError as error:
            raise MissingIndexError(
                f"{path}: no such index. `python -m k25_train.data index data=NAME` makes it."
            ) from error
        except OSError as error:
            raise DataError(f"{path}: this index cannot be read ({error}). Bring it back.") from error
        header, places, first = parse_prefix(path, mapped)
        columns = {}
        for name, (start, count) in places.items():
            if first + start + count * item_size(name) > num_bytes:
                raise IndexFileError(
                    f"{path}: has {num_bytes} bytes but its column {name} ends at byte "
                    f"{first + start + count * item_size(name)}; the index was cut short. Copy it again, or "
                    f"{INDEX_AGAIN}."
                )
            columns[name] = np.frombuffer(mapped, COLUMNS[name].dtype, count, first + start)
        check_counts(path, header, columns)
        return cls(header, columns, str(path), source)

    def __len__(self) -> int:
        return self.header.num_items

    # What planning takes, each for many items at once.

    @property
    def text_tokens(self) -> np.ndarray:
        """[items] u32, text tokens of each, without special tokens."""
        return self.columns["text_tokens"]

    @property
    def first_segment(self) -> np.ndarray | None:
        """[items + 1] u64, where the segments of each begin in `segments`; None if each is one text with a
        loss."""
        return self.columns.get("first_segment")

    @property
    def segments(self) -> np.ndarray:
        """[segments] u32: `IS_MEDIA`, or the number of `TOKENS` of a text, with `HAS_LOSS`."""
        return self.columns["segments"]

    @property
    def first_media(self) -> np.ndarray | None:
        """[items + 1] u64, where the media of each begin in the columns `media_…`; None without media."""
        return self.columns.get("first_media")

    @property
    def has_media(self) -> bool:
        """Whether any item has an image or a video."""
        return self.header.has_media

    # One item, or one shard.

    def record(self, item: int) -> SampleRecord:
        """All that the index knows of one item, a number from 0 on.

        Raises DataError, naming it, for values that no sample has: an index from somewhere else may hold any.
        """
        columns = self.columns
        try:
            shard = self.shard(int(columns["shard"][item]))
            media = iter(self._media(item))
            segments = tuple(
                next(media) if word & IS_MEDIA else _text(word) for word in self._segment_words(item)
            )
            record = SampleRecord(
                shard=shard.name,
                key=self._key(item),
                kind=self._kind(item, segments),
                source=self.source,
                offset=int(columns["offset"][item]),
                num_bytes=int(columns["num_bytes"][item]),
                segments=segments,
                crc32=f"{int(columns['crc32'][item]):08x}" if shard.has_checksums else "",
            )
            check_place(record.offset, record.num_bytes, shard.num_bytes)
        except (*MALFORMED, IndexError, StopIteration) as error:
            raise DataError(
                f"{self.path}, item {item}: no sample has these values ({error!r}). Do not use this index: "
                f"{INDEX_AGAIN}."
            ) from error
        return record

    def shard(self, number: int) -> ShardInfo:
        """One of the files that items lie in."""
        if number not in self._shards:
            self._shards[number] = shard = self._read_shard(number)
            self._by_name[shard.name] = shard
        return self._shards[number]

    def shard_named(self, name: str) -> ShardInfo:
        """One of the files, by its name; costs nothing for one that a record of this index has named."""
        if name not in self._by_name:
            self._by_name.update({shard.name: shard for shard in self.shards()})
        return self._by_name[name]

    def shards(self) -> list[ShardInfo]:
        """All of them; costs as much as there are shards."""
        return [self._read_shard(number) for number in range(self.header.num_shards)]

    def items_in(self, shard: int) -> tuple[int, int]:
        """First item that lies in a file and the one after its last; they follow one another."""
        numbers = self.columns["shard"]
        return int(np.searchsorted(numbers, shard, "left")), int(np.searchsorted(numbers, shard, "right"))

    def _read_shard(self, number: int) -> ShardInfo:
        text = _slice(self.columns["shard_text"], self.columns["shard_text_end"], number)
        return ShardInfo.parse(text, int(self.columns["shard_bytes"][number]))

    def _key(self, item: int) -> str:
        if "key_end" not in self.columns:
            return str(item)
        return _slice(self.columns["keys"], self.columns["key_end"], item).decode()

    def _kind(self, item: int, segments: tuple[Segment, ...]) -> str:
        if "kind" in self.columns:
            return SAMPLE_KINDS[self.columns["kind"][item]]
        return "caption" if any(isinstance(each, MediaSegment) for each in segments) else "text"

    def _segment_words(self, item: int) -> list[int]:
        first = self.first_segment
        if first is None:
            return [int(self.text_tokens[item]) | HAS_LOSS]
        return self.segments[int(first[item]) : int(first[item + 1])].tolist()

    def _media(self, item: int) -> list[MediaSegment]:
        first = self.first_media
        if first is None:
            return []
        return [self.media(number) for number in range(int(first[item]), int(first[item + 1]))]

    def media(self, number: int) -> MediaSegment:
        """One image or video, by its place in the columns `media_…`."""
        columns = self.columns
        shard = self.shard(int(columns["media_shard"][number]))
        offset, num_bytes = int(columns["media_offset"][number]), int(columns["media_bytes"][number])
        check_place(offset, num_bytes, shard.num_bytes)
        return MediaSegment(
            type=MEDIA_TYPES[columns["media_type"][number]],
            shard=shard.name,
            offset=offset,
            num_bytes=num_bytes,
            format=self.header.media_formats[columns["media_format"][number]],
            width=int(columns["media_width"][number]),
            height=int(columns["media_height"][number]),
            num_frames=int(columns["media_frames"][number]),
            duration_s=float(columns["media_duration_s"][number]),
            frame_times=_slice(columns["frame_times"], columns["frame_times_end"], number).decode(),
            crc32=f"{int(columns['media_crc32'][number]):08x}" if shard.has_checksums else "",
            format_version=shard.format_version,
        )

    def named(self, source: str) -> "SourceIndex":
        """The same with the name of its source."""
        return replace(self, source=source)


def _text(word: int) -> TextSegment:
    return TextSegment(num_tokens=word & TOKENS, loss=bool(word & HAS_LOSS))


def _slice(texts: np.ndarray, ends: np.ndarray, number: int) -> bytes:
    start = int(ends[number - 1]) if number else 0
    return texts[start : int(ends[number])].tobytes()
