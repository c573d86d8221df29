"""Makes the columns of an index in memory: of a small set, or of a stretch of a large one."""

from array import array
from collections.abc import Iterable
from typing import Any

import numpy as np

from k25_train.config.sources import SAMPLE_KINDS
from k25_train.data.formats.index_layout import COLUMNS, HAS_LOSS, IS_MEDIA, TOKENS, ShardInfo, SourceHeader
from k25_train.data.formats.records import MEDIA_TYPES, MediaSegment, SampleRecord, TextSegment
from k25_train.data.formats.source_index import SourceIndex
from k25_train.errors import DataError

_TYPECODES = {"<u8": "Q", "<u4": "I", "<f8": "d", "u1": "B"}
_COUNTS = ("num_segments", "num_media")


class IndexBuilder:
    """Collects items, shard after shard, in 24 bytes each and more for media."""

    def __init__(self, header: SourceHeader, *, keeps_keys: bool = False, keeps_kinds: bool = False) -> None:
        """`header`: format, tokenizer, frame and facts; counts are filled in. `keeps_keys`: whether items
        keep the names that their records have, which is for formats whose users know them by those;
        `keeps_kinds`: whether they keep their kind, which is else known by their media."""
        self._header = header
        self._keeps_keys = keeps_keys
        self._keeps_kinds = keeps_kinds
        self._columns: dict[str, array[Any]] = {
            name: array(_TYPECODES[column.dtype]) for name, column in COLUMNS.items()
        }
        self._counts = {name: array("I") for name in _COUNTS}
        self._formats: dict[str, int] = {}
        self._shards: dict[str, int] = {}
        self._has_checksums = False
        self._is_plain = True
        self.num_tokens = 0
        """Text tokens of all items so far."""

    def __len__(self) -> int:
        return len(self._columns["offset"])

    @property
    def num_rows(self) -> int:
        """Items, segments and media: what its memory goes by."""
        return len(self) + len(self._columns["segments"]) + len(self._columns["media_offset"])

    def add_shard(self, shard: ShardInfo) -> None:
        """Begin the next file, which items added from here on lie in. Raises DataError if it is twice."""
        if shard.name in self._shards:
            raise DataError(f"{shard.name}: is twice among the files of a source. Name each file once.")
        self._shards[shard.name] = len(self._shards)
        self._has_checksums |= shard.has_checksums
        columns = self._columns
        columns["shard_bytes"].append(shard.num_bytes)
        columns["shard_text"].frombytes(shard.text())
        columns["shard_text_end"].append(len(columns["shard_text"]))

    def add(self, record: SampleRecord) -> None:
        """Add an item to the current shard, which its record names; its media may lie in earlier ones.

        Raises DataError, naming the sample, for sizes that no index can hold.
        """
        columns = self._columns
        try:
            columns["offset"].append(record.offset)
            columns["num_bytes"].append(record.num_bytes)
            columns["shard"].append(self._shards[record.shard])
            columns["text_tokens"].append(record.num_text_tokens)
            columns["crc32"].append(int(record.crc32 or "0", 16))
            if self._keeps_keys:
                columns["keys"].frombytes(record.key.encode())
                columns["key_end"].append(len(columns["keys"]))
            if self._keeps_kinds:
                columns["kind"].append(SAMPLE_KINDS.index(record.kind))
            for segment in record.segments:
                if isinstance(segment, MediaSegment):
                    columns["segments"].append(IS_MEDIA)
                    self._add_media(segment)
                else:
                    columns["segments"].append(_word(segment))
        except (OverflowError, ValueError, KeyError) as error:
            raise DataError(
                f"{record.shard}, sample {record.key}: no index can hold its sizes ({error!r}): a file and "
                "its words have less than 4 GiB and 2^30 tokens. Cut it into several samples."
            ) from error
        self._counts["num_segments"].append(len(record.segments))
        self._counts["num_media"].append(len(record.media))
        self._is_plain &= len(record.segments) == 1 and columns["segments"][-1] & ~TOKENS == HAS_LOSS
        self.num_tokens += record.num_text_tokens

    def add_texts(self, offsets: np.ndarray, num_bytes: np.ndarray, num_tokens: np.ndarray) -> None:
        """Add many items to the current shard: each is one text with a loss, without checksum or name.

        All are [n]. Raises DataError for sizes that no index can hold.
        """
        if len(num_bytes) and (int(num_bytes.max()) >= 1 << 32 or int(num_tokens.max()) > TOKENS):
            longest = int(np.argmax(num_bytes))
            raise DataError(
                f"{list(self._shards)[-1]}: document {longest} has {int(num_bytes[longest])} bytes; an index "
                "holds documents of less than 4 GiB and 2^30 tokens. Cut it into several."
            )
        count, columns = len(offsets), self._columns
        ones = np.ones(count, np.uint32).tobytes()
        for name, values in {
            "offset": offsets,
            "num_bytes": num_bytes,
            "text_tokens": num_tokens,
            "shard": np.full(count, len(self._shards) - 1),
            "crc32": np.zeros(count),
            "segments": num_tokens.astype(np.int64) | HAS_LOSS,
        }.items():
            columns[name].frombytes(values.astype(COLUMNS[name].dtype).tobytes())
        self._counts["num_segments"].frombytes(ones)
        self._counts["num_media"].frombytes(bytes(len(ones)))
        self.num_tokens += int(num_tokens.sum())

    def build(self) -> SourceIndex:
        """All of it as an index in memory; splits are not stated."""
        header = self._header
        columns = {name: _array(values, COLUMNS[name].dtype) for name, values in self._columns.items()}
        absent = set() if self._keeps_keys else {"keys", "key_end"}
        absent |= set() if self._keeps_kinds else {"kind"}
        absent |= set() if self._has_checksums else {"crc32", "media_crc32"}
        absent |= {"first_segment", "segments"} if self._is_plain else set()
        if not columns["media_offset"].size:
            absent |= {"first_media", "frame_times", *(name for name in COLUMNS if name.startswith("media_"))}
            absent.add("frame_times_end")
        for name in _COUNTS:
            columns[name.replace("num_", "first_").removesuffix("s")] = firsts(
                _array(self._counts[name], "<u4")
            )
        return SourceIndex(
            header=SourceHeader(
                format=header.format,
                tokenizer_sha256=header.tokenizer_sha256,
                frame=header.frame,
                num_items=len(self),
                num_tokens=self.num_tokens,
                num_media=len(columns["media_offset"]),
                num_shards=len(self._shards),
                media_formats=tuple(self._formats),
                facts=header.facts,
            ),
            columns={name: values for name, values in columns.items() if name not in absent},
        )

    def _add_media(self, segment: MediaSegment) -> None:
        columns = self._columns
        columns["frame_times"].frombytes(segment.frame_times.encode())
        for name, value in {
            "media_offset": segment.offset,
            "media_bytes": segment.num_bytes,
            "media_shard": self._shards[segment.shard],
            "media_width": segment.width,
            "media_height": segment.height,
            "media_frames": segment.num_frames,
            "media_duration_s": segment.duration_s,
            "media_crc32": int(segment.crc32 or "0", 16),
            "media_type": MEDIA_TYPES.index(segment.type),
            "media_format": self._formats.setdefault(segment.format, len(self._formats)),
            "frame_times_end": len(columns["frame_times"]),
        }.items():
            columns[name].append(value)


def index_of_records(
    header: SourceHeader, shards: Iterable[tuple[ShardInfo, Iterable[SampleRecord]]]
) -> SourceIndex:
    """An index in memory of records by shard; items keep their names."""
    builder = IndexBuilder(header, keeps_keys=True)
    for shard, records in shards:
        builder.add_shard(shard)
        for record in records:
            builder.add(record)
    return builder.build()


def firsts(counts: np.ndarray) -> np.ndarray:
    """[n] counts -> [n + 1] u64, where each one's values begin."""
    ends = np.zeros(len(counts) + 1, np.uint64)
    np.cumsum(counts, out=ends[1:], dtype=np.uint64)
    return ends


def _word(segment: TextSegment) -> int:
    if segment.num_tokens > TOKENS:
        raise OverflowError(f"a text of {segment.num_tokens} tokens")
    return segment.num_tokens | (HAS_LOSS if segment.loss else 0)


def _array(values: "array[int] | array[float]", dtype: str) -> np.ndarray:
    return np.frombuffer(values, dtype) if len(values) else np.zeros(0, dtype)
