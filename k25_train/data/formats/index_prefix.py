"""What a reader of an index parses and checks before it takes anything from the columns."""

import mmap
from collections.abc import Mapping
from pathlib import Path

import numpy as np

from k25_train.data.formats.index_layout import (
    COLUMNS,
    MAGIC,
    PREFIX,
    VERSION,
    SourceHeader,
    aligned,
    parse_header,
)
from k25_train.errors import DataError

INDEX_AGAIN = "`python -m k25_train.data index data=NAME` makes it again"
MALFORMED = (ValueError, TypeError, KeyError, AttributeError, RecursionError, OverflowError)
"""What values raise that no index has."""


class IndexFileError(DataError):
    """A file is no index of this version, or not all of one."""


class MissingIndexError(DataError):
    """A source has no index yet."""


def parse_prefix(path: str | Path, mapped: mmap.mmap) -> tuple[SourceHeader, dict[str, tuple[int, int]], int]:
    """Header, place of each column, and the byte that these count from. Raises IndexFileError."""
    magic, version, header_bytes = PREFIX.unpack(mapped[: PREFIX.size])
    if magic != MAGIC:
        raise no_index(path, f"it begins with {magic!r}")
    if version != VERSION:
        raise IndexFileError(
            f"{path}: is an index of version {version}, this code reads {VERSION}; {INDEX_AGAIN}."
        )
    end = PREFIX.size + header_bytes
    if end > len(mapped):
        raise IndexFileError(f"{path}: has {len(mapped)} bytes, its header alone {end}; it was cut short. "
                             f"Copy it again, or {INDEX_AGAIN}.")  # fmt: skip
    try:
        header, columns = parse_header(mapped[PREFIX.size : end])
    except MALFORMED as error:
        raise IndexFileError(f"{path}: its header is malformed ({error!r}); {INDEX_AGAIN}.") from error
    return header, columns, aligned(end)


def no_index(path: str | Path, found: str) -> IndexFileError:
    """The error of a file that is something else."""
    return IndexFileError(
        f"{path}: is no index of a source ({found}). Name the index with data.sources.NAME.index, or "
        f"{INDEX_AGAIN}."
    )


def check_counts(path: str | Path, header: SourceHeader, columns: Mapping[str, np.ndarray]) -> None:
    """What the header counts has to be what the columns hold. Raises IndexFileError."""
    counts = {"item": header.num_items, "media": header.num_media, "shard": header.num_shards}
    needed = {"offset", "num_bytes", "shard", "text_tokens", "shard_bytes", "shard_text", "shard_text_end"}
    if header.num_media:
        needed |= {"first_media", *(name for name, column in COLUMNS.items() if column.per.what == "media")}
        needed -= {"media_crc32"}
    missing = sorted(needed - set(columns))
    wrong = [
        f"{name} has {len(columns[name])} values"
        for name, column in COLUMNS.items()
        if name in columns
        and column.per.what in counts
        and len(columns[name]) != counts[column.per.what] + column.per.extra
    ]
    spans = sorted(header.splits.values())
    bounds = [0, *(bound for span in spans for bound in span), header.num_items]
    if bounds != sorted(bounds):
        wrong.append(f"its splits {dict(header.splits)} overlap or are of no items")
    if missing or wrong:
        problem = "; ".join([*(f"no column {name}" for name in missing), *wrong])
        raise IndexFileError(
            f"{path}: its header says {header.num_items} items, {header.num_media} media and "
            f"{header.num_shards} shards, but: {problem}. Do not use it; {INDEX_AGAIN}."
        )
