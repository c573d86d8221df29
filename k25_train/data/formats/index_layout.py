"""How the index of a source lies in its file: header and columns, for readers and writers alike.

    bytes 0-7     "K25INDEX"
    bytes 8-15    u32 version, u32 length of the header
    header        JSON: `SourceHeader`, and for each column its first byte (from the end of the header,
                  rounded up to 64) and its number of values
    columns       little-endian arrays, each aligned to 64 bytes

Nothing in it grows with the number of items but the columns, nor with the number of shards: a reader maps the
file and parses a header of about 1 KB. A text costs 24 bytes, or 20 without checksum.
"""

import json
import struct
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any, NamedTuple

import numpy as np

MAGIC = b"K25INDEX"
VERSION = 3
"""Versions 1 and 2 are the JSON lines next to the shards of a shard set (`index.py`)."""
PREFIX = struct.Struct("<8sII")
ALIGNMENT = 64
IS_MEDIA = 1 << 31
"""Bit of a segment that is an image or a video: the item's next one."""
HAS_LOSS = 1 << 30
"""Bit of a text segment whose tokens are training targets."""
TOKENS = HAS_LOSS - 1
"""Bits of a text segment that count its tokens."""


class Per(NamedTuple):
    """What a column has values of."""

    what: str
    """`item`, `segment`, `media`, `shard`, or `byte` for texts that others have the ends of."""
    extra: int = 0
    """Values more than that."""


class Column(NamedTuple):
    """One array of an index."""

    dtype: str
    per: Per
    hashed: str = ""
    """Which hash it goes into: `sizes`, `content` (checksums), or none if it says where things are."""


_ITEM, _MEDIA, _SHARD, _BYTE = Per("item"), Per("media"), Per("shard"), Per("byte")
_FIRST = Per("item", 1)
COLUMNS: dict[str, Column] = {
    # Items. Absent: crc32 without checksums; first_segment if every item is one text with a loss; first_media
    # without media; key_end if an item has no name but its number; kind (of `SAMPLE_KINDS`) in all but shard
    # sets.
    "offset": Column("<u8", _ITEM),
    "num_bytes": Column("<u4", _ITEM),
    "shard": Column("<u4", _ITEM),
    "text_tokens": Column("<u4", _ITEM, "sizes"),
    "crc32": Column("<u4", _ITEM, "content"),
    "first_segment": Column("<u8", _FIRST, "sizes"),
    "first_media": Column("<u8", _FIRST, "sizes"),
    "key_end": Column("<u8", _ITEM),
    "kind": Column("u1", _ITEM, "sizes"),
    "segments": Column("<u4", Per("segment"), "sizes"),
    # Images and videos.
    "media_offset": Column("<u8", _MEDIA),
    "media_bytes": Column("<u4", _MEDIA, "sizes"),
    "media_shard": Column("<u4", _MEDIA),
    "media_width": Column("<u4", _MEDIA, "sizes"),
    "media_height": Column("<u4", _MEDIA, "sizes"),
    "media_frames": Column("<u4", _MEDIA, "sizes"),
    "media_duration_s": Column("<f8", _MEDIA, "sizes"),
    "media_crc32": Column("<u4", _MEDIA, "content"),
    "media_type": Column("u1", _MEDIA, "sizes"),
    "media_format": Column("u1", _MEDIA, "sizes"),
    "frame_times_end": Column("<u8", _MEDIA, "sizes"),
    # Shards: their size, and a JSON text of what else is known of each.
    "shard_bytes": Column("<u8", _SHARD),
    "shard_text_end": Column("<u8", _SHARD),
    # Texts, one behind the other.
    "keys": Column("u1", _BYTE),
    "frame_times": Column("u1", _BYTE, "sizes"),
    "shard_text": Column("u1", _BYTE),
}
"""Name -> column, in the order in which they lie in the file."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ShardInfo:
    """A file that items lie in."""

    name: str
    """Relative to the source's folder."""
    num_bytes: int
    """Its size when it was indexed."""
    stamp: str = ""
    """By which a change of it is noticed: its ETag or time of modification; empty if neither is known."""
    split: str = ""
    """Split of its items, where a format has splits; shards of a split follow one another."""
    format_version: int = 2
    """Of what its media were indexed by (`records.FORMAT_VERSION`)."""
    has_checksums: bool = True
    """Whether the index has a CRC-32 of each of its items."""
    facts: Mapping[str, Any] = field(default_factory=dict)
    """What else the format's reader has to know of it."""

    def text(self) -> bytes:
        """All but the size, as `parse` reads it."""
        fields = asdict(self)
        del fields["num_bytes"]
        return json.dumps(fields, ensure_ascii=False).encode()

    @classmethod
    def parse(cls, text: bytes, num_bytes: int) -> "ShardInfo":
        """The inverse of `text`. Raises ValueError, TypeError or KeyError for any other."""
        return cls(**json.loads(text), num_bytes=num_bytes)


@dataclass(frozen=True, slots=True, kw_only=True)
class SourceHeader:
    """What an index says of its source as a whole."""

    format: str
    """Name of the format (`config.sources.SourceFormat`)."""
    tokenizer_sha256: str
    """Of the vocabulary that counted the tokens."""
    frame: bool = True
    """Whether a document is put between [BOS] and [EOS]; a chat brings its own."""
    num_items: int = 0
    """Samples in it."""
    num_tokens: int = 0
    """Text tokens of all samples, without special tokens."""
    num_media: int = 0
    """Images and videos."""
    num_shards: int = 0
    """Files."""
    splits: Mapping[str, tuple[int, int]] = field(default_factory=dict)
    """Split -> its first item and the one after its last; empty where the format has no splits."""
    media_formats: tuple[str, ...] = ()
    """File extensions, by their number in the column `media_format`."""
    sizes_sha256: str = ""
    """Hash of all sizes, whatever files they lie in: equal ones give equal plans. Empty if not yet known."""
    content_sha256: str = ""
    """Hash of all checksums; empty without."""
    facts: Mapping[str, Any] = field(default_factory=dict)
    """What else the format's reader has to know of the source."""

    @property
    def has_media(self) -> bool:
        """Whether any sample has an image or a video."""
        return self.num_media > 0


def encode_prefix(header: SourceHeader, columns: Mapping[str, tuple[int, int]]) -> bytes:
    """All that is in front of the columns; `columns`: name -> first byte and number of values."""
    text = json.dumps({**asdict(header), "columns": columns}, ensure_ascii=False).encode()
    prefix = PREFIX.pack(MAGIC, VERSION, len(text)) + text
    return prefix.ljust(aligned(len(prefix)), b"\0")


def parse_header(text: bytes) -> tuple[SourceHeader, dict[str, tuple[int, int]]]:
    """The inverse of `encode_prefix`. Raises ValueError, TypeError or KeyError for anything else."""
    fields = json.loads(text)
    columns = {str(name): (int(first), int(count)) for name, (first, count) in fields.pop("columns").items()}
    if not set(columns) <= set(COLUMNS) or any(min(place) < 0 for place in columns.values()):
        raise ValueError(f"unknown columns {sorted(set(columns) - set(COLUMNS))}, or impossible places")
    fields["splits"] = {split: (int(first), int(stop)) for split, (first, stop) in fields["splits"].items()}
    fields["media_formats"] = tuple(fields["media_formats"])
    return SourceHeader(**fields), columns


def item_size(column: str) -> int:
    """Bytes of one value of a column."""
    return np.dtype(COLUMNS[column].dtype).itemsize


def aligned(num_bytes: int) -> int:
    """The next multiple of `ALIGNMENT`."""
    return -(-num_bytes // ALIGNMENT) * ALIGNMENT
