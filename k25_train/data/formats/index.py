"""The shard set on disk: what `dataset.json` and the `*.index.jsonl` files say, as typed records.

A shard set is one directory (local, or any fsspec URL):

    dataset.json               format version, tokenizer file, splits, sources with their licences
    tokenizer.json             the tokenizer that counted the tokens in every index
    <split>-00000.tar          samples in WebDataset naming; media members keep their native file format
    <split>-00000.index.jsonl  one header line, then one line a sample: where it lies and how large it is

The index holds native sizes (pixels, frames, seconds, tokens), never model-dependent ones, so every rank can
compute all patch grids and all sequence lengths of a step without opening a shard, for any model's limits.
"""

import hashlib
import json
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from typing import Any

import fsspec  # type: ignore[import-untyped]

from k25_train.config.data import SAMPLE_KINDS
from k25_train.errors import DataError

FORMAT_VERSION = 1
MEDIA_TYPES = ("image", "video")


@dataclass(frozen=True, slots=True, kw_only=True)
class TextSegment:
    """A stretch of text. Its words are in the sample's `.json` member, under the same segment position."""

    num_tokens: int
    """Length under the shard set's tokenizer, without any special token."""
    loss: bool
    """Whether its tokens are training targets."""


@dataclass(frozen=True, slots=True, kw_only=True)
class MediaSegment:
    """An image or a video, stored in its native file format."""

    type: str
    """`image` or `video`."""
    shard: str
    """File name of the shard that holds it."""
    offset: int
    """First byte of the file inside the shard."""
    num_bytes: int
    """Length of the file."""
    format: str
    """File extension without dot: png, jpg, webp, gif, mp4 …"""
    width: int
    """Native width in pixels, after the file's own orientation tag is applied."""
    height: int
    """Native height in pixels, after the file's own orientation tag is applied."""
    num_frames: int
    """Frames in the file; 1 for an image."""
    duration_s: float
    """Length of the video in seconds; 0 for an image."""

    def __post_init__(self) -> None:
        """Raises ValueError for sizes that no file has."""
        if min(self.width, self.height, self.num_frames) < 1 or not 0 <= self.duration_s < float("inf"):
            raise ValueError(f"impossible sizes: {self}")


Segment = TextSegment | MediaSegment


@dataclass(frozen=True, slots=True, kw_only=True)
class SampleRecord:
    """One sample as the index knows it."""

    shard: str
    """File name of the shard, relative to the shard set's directory."""
    key: str
    """Name of the sample, unique in its shard."""
    kind: str
    """One of `SAMPLE_KINDS`; all but `text` have at least one image or video."""
    source: str
    """Name of the source, as listed in `dataset.json`."""
    offset: int
    """First byte of the sample's `.json` member inside the shard."""
    num_bytes: int
    """Length of that member."""
    segments: tuple[Segment, ...]
    """Text and media in reading order."""

    @property
    def num_text_tokens(self) -> int:
        """Tokens in all text segments, without special tokens."""
        return sum(segment.num_tokens for segment in self.segments if isinstance(segment, TextSegment))


@dataclass(frozen=True, slots=True, kw_only=True)
class IndexHeader:
    """First line of an index file; makes a shard cut short or a foreign tokenizer noticeable."""

    format_version: int
    shard: str
    shard_bytes: int
    tokenizer_sha256: str
    num_samples: int


def file_sha256(path: str) -> str:
    """Hex SHA-256 of the file at `path` (any fsspec URL). A tokenizer is identified by that of its file."""
    with fsspec.open(path, "rb") as file:
        return hashlib.sha256(file.read()).hexdigest()


def write_index(path: str, header: IndexHeader, records: Iterable[SampleRecord]) -> None:
    """Write an index file: the header line, then one line for each record."""
    with fsspec.open(path, "w", encoding="utf-8") as file:
        file.write(json.dumps(asdict(header)) + "\n")
        for record in records:
            file.write(json.dumps(_record_to_json(record), ensure_ascii=False) + "\n")


def read_index_header(path: str) -> IndexHeader:
    """Read the header of an index file. Raises DataError if it is missing or of another format version."""
    with _open_text(path) as file:
        return _parse_header(path, file.readline())


def read_index(path: str) -> list[SampleRecord]:
    """Read all records of an index file.

    Raises DataError, naming file and line, for a malformed line, and if the number of records is not the
    header's (an index cut short).
    """
    with _open_text(path) as file:
        header = _parse_header(path, file.readline())
        records = [_parse_record(path, number, line, header) for number, line in enumerate(file, start=2)]
    if len(records) != header.num_samples:
        raise DataError(
            f"{path}: holds {len(records)} samples but its header says {header.num_samples}; the index is "
            "incomplete. Build the shard set again (`python -m k25_train.data build`)."
        )
    return records


def _open_text(path: str) -> Any:
    try:
        return fsspec.open(path, "r", encoding="utf-8").open()
    except FileNotFoundError as error:
        raise DataError(
            f"{path}: no such file. Build the shard set (`python -m k25_train.data build`)."
        ) from error


def _parse_header(path: str, line: str) -> IndexHeader:
    try:
        header = IndexHeader(**json.loads(line))
    except (ValueError, TypeError) as error:
        raise DataError(
            f"{path}, line 1: not an index header ({error}). Build the shard set again."
        ) from error
    if header.format_version != FORMAT_VERSION:
        raise DataError(
            f"{path}: format_version is {header.format_version}, this code reads {FORMAT_VERSION}. "
            "Build the shard set again with this version."
        )
    return header


def _parse_record(path: str, line_number: int, line: str, header: IndexHeader) -> SampleRecord:
    try:
        fields = json.loads(line)
        segments = tuple(_parse_segment(segment, header.shard) for segment in fields.pop("segments"))
        record = SampleRecord(shard=header.shard, num_bytes=fields.pop("bytes"), segments=segments, **fields)
    except (ValueError, TypeError, KeyError, AttributeError) as error:
        raise DataError(
            f"{path}, line {line_number}: not a sample record ({error!r}). Build the shard set again."
        ) from error
    if record.kind not in SAMPLE_KINDS:
        raise DataError(
            f"{path}, line {line_number}: kind is {record.kind!r}, known kinds are {', '.join(SAMPLE_KINDS)}."
        )
    return record


def _parse_segment(fields: dict[str, Any], shard: str) -> Segment:
    if fields["type"] == "text":
        return TextSegment(num_tokens=fields["num_tokens"], loss=fields["loss"])
    if fields["type"] not in MEDIA_TYPES:
        raise ValueError(f"segment type {fields['type']!r} is none of text, {', '.join(MEDIA_TYPES)}")
    return MediaSegment(shard=shard, num_bytes=fields.pop("bytes"), **fields)


def _record_to_json(record: SampleRecord) -> dict[str, Any]:
    return {
        "key": record.key,
        "kind": record.kind,
        "source": record.source,
        "offset": record.offset,
        "bytes": record.num_bytes,
        "segments": [_segment_to_json(segment) for segment in record.segments],
    }


def _segment_to_json(segment: Segment) -> dict[str, Any]:
    if isinstance(segment, TextSegment):
        return {"type": "text", **asdict(segment)}
    fields = asdict(segment)
    del fields["shard"]
    fields["bytes"] = fields.pop("num_bytes")
    return fields
