"""Index files of a shard set: one header line, then one line of JSON per sample.

Planning reads nothing else. `records.py` says what a record holds, `dataset.py` what else is in the set.
"""

import json
import zlib
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from typing import Any

import fsspec  # type: ignore[import-untyped]

from k25_train.config.sources import SAMPLE_KINDS
from k25_train.data.formats.limits import check_count, check_sizes, check_text
from k25_train.data.formats.records import (
    MEDIA_TYPES,
    READABLE_VERSIONS,
    MediaSegment,
    SampleRecord,
    Segment,
    TextSegment,
)
from k25_train.errors import DataError

_MALFORMED = (ValueError, TypeError, KeyError, AttributeError, RecursionError)
"""What parsing a line raises that has other JSON than expected, or none."""


@dataclass(frozen=True, slots=True, kw_only=True)
class IndexHeader:
    """First line of an index file; makes a shard cut short or a foreign tokenizer noticeable."""

    format_version: int
    shard: str
    shard_bytes: int
    tokenizer_sha256: str
    num_samples: int


def bytes_crc32(data: bytes) -> str:
    """CRC-32 of a member of a shard as the index has it. It finds every change of up to 32 bits in a row."""
    return f"{zlib.crc32(data):08x}"


def write_index(path: str, header: IndexHeader, records: Iterable[SampleRecord]) -> None:
    """Write an index file: the header line, then one line for each record."""
    with fsspec.open(path, "w", encoding="utf-8") as file:
        file.write(json.dumps(asdict(header)) + "\n")
        for record in records:
            file.write(json.dumps(_record_to_json(record), ensure_ascii=False) + "\n")


def parse_index(path: str, data: bytes) -> tuple[IndexHeader, list[SampleRecord]]:
    """Header and records of an index file; `path` is for messages.

    Raises DataError, naming file and line, for a malformed line, for sizes that the shard cannot hold, and if
    the number of records is not the header's (an index cut short).
    """
    first, *lines = data.removesuffix(b"\n").split(b"\n")
    header = parse_header(path, first)
    records = [_parse_record(path, number, line, header) for number, line in enumerate(lines, start=2)]
    if len(records) != header.num_samples:
        raise DataError(
            f"{path}: holds {len(records)} samples but its header says {header.num_samples}; the index is "
            "incomplete. Build the shard set again (`python -m k25_train.data build`)."
        )
    return header, records


def parse_header(path: str, line: bytes) -> IndexHeader:
    """The first line of an index file; raises DataError, naming the file, for one that is none."""
    try:
        header = IndexHeader(**json.loads(line))
        check_count(header.shard_bytes, "shard_bytes")
        check_count(header.num_samples, "num_samples")
        check_text(header.tokenizer_sha256, "tokenizer_sha256")
    except _MALFORMED as error:
        raise DataError(
            f"{path}, line 1: not an index header ({error}). Build the shard set again."
        ) from error
    if header.format_version not in READABLE_VERSIONS:
        raise DataError(
            f"{path}: format_version is {header.format_version}, this code reads {READABLE_VERSIONS}. "
            "Build the shard set again with this version."
        )
    return header


def _parse_record(path: str, line_number: int, line: bytes, header: IndexHeader) -> SampleRecord:
    try:
        fields = json.loads(line)
        segments = tuple(_parse_segment(segment, header) for segment in fields.pop("segments"))
        record = SampleRecord(shard=header.shard, num_bytes=fields.pop("bytes"), segments=segments, **fields)
        check_sizes(record, header.shard_bytes)
    except _MALFORMED as error:
        raise DataError(
            f"{path}, line {line_number}: not a sample record ({error!r}). Build the shard set again."
        ) from error
    if record.kind not in SAMPLE_KINDS:
        raise DataError(
            f"{path}, line {line_number}: kind is {record.kind!r}, known kinds are {', '.join(SAMPLE_KINDS)}."
        )
    return record


def _parse_segment(fields: dict[str, Any], header: IndexHeader) -> Segment:
    if fields["type"] == "text":
        return TextSegment(num_tokens=fields["num_tokens"], loss=fields["loss"])
    if fields["type"] not in MEDIA_TYPES:
        raise ValueError(f"segment type {fields['type']!r} is none of text, {', '.join(MEDIA_TYPES)}")
    fields.setdefault("frame_times", "")
    num_bytes = fields.pop("bytes")
    return MediaSegment(
        shard=header.shard, num_bytes=num_bytes, format_version=header.format_version, **fields
    )


def _record_to_json(record: SampleRecord) -> dict[str, Any]:
    return {
        "key": record.key,
        "kind": record.kind,
        "source": record.source,
        "offset": record.offset,
        "bytes": record.num_bytes,
        "crc32": record.crc32,
        "segments": [_segment_to_json(segment) for segment in record.segments],
    }


def _segment_to_json(segment: Segment) -> dict[str, Any]:
    if isinstance(segment, TextSegment):
        return {"type": "text", **asdict(segment)}
    fields = asdict(segment)
    del fields["shard"], fields["format_version"]
    if not segment.frame_times:
        del fields["frame_times"]
    fields["bytes"] = fields.pop("num_bytes")
    return fields
