"""The header of a file of parts: what is where in it, as the safetensors library reads it too.

```
8 bytes │ JSON header │ data of part 0 │ data of part 1 │ … │ checksums, 8 bytes per block │
 length   names, dtypes, offsets; which tensors these are parts of
```

The format is that of safetensors 0.8 (README of huggingface/safetensors, "Format"): entries follow each other
without holes. Each part is a 1-D entry. Data of every entry start at a multiple of 8 bytes, for which entries
`padding.N` are put in between: the library makes views of the file, which must be aligned.
"""

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import xxhash

from k25_train.checkpoint.files.parts import DTYPE_NAMES, DTYPES, Part, TensorInfo
from k25_train.errors import CheckpointError

FORMAT_VERSION = 3
"""Of a file of parts, as of the manifest that lists it."""
BLOCK_BYTES = 256 * 1024
"""What a checksum is of. A range costs at most two such blocks more than it has, and a table 0.003% of the
data. Our choice."""
MAX_HEADER_BYTES = 100_000_000
"""The limit of the safetensors library (`MAX_HEADER_SIZE`)."""
LENGTH_BYTES = 8
_ALIGNMENT = 8
_CHECKSUMS, _PADDING, _METADATA, _OURS = "checksums", "padding.", "__metadata__", "k25_train"
_ENTRY = re.compile(r"(.+)\[(\d+):(\d+)\]", re.DOTALL)


@dataclass(frozen=True, slots=True)
class Entry:
    """Data within a file: a part, or padding."""

    offset: int
    """First byte, from the end of the header."""
    num_bytes: int
    """Length of the data."""
    part: Part | None
    """None for padding."""

    @property
    def num_blocks(self) -> int:
        """Checksums that it has."""
        return -(-self.num_bytes // BLOCK_BYTES)


@dataclass(frozen=True, slots=True)
class Header:
    """What is in a file."""

    entries: tuple[Entry, ...]
    """In the order of the file."""
    num_bytes: int
    """Of length and header together: where data start."""

    @property
    def table_offset(self) -> int:
        """First byte of the checksums, from the start of the file."""
        last = self.entries[-1] if self.entries else Entry(0, 0, None)
        return self.num_bytes + last.offset + last.num_bytes

    @property
    def table_bytes(self) -> int:
        """Bytes of the checksums."""
        return 8 * sum(entry.num_blocks for entry in self.entries)

    @property
    def file_bytes(self) -> int:
        """Size of the file."""
        return self.table_offset + self.table_bytes


def digest_of(data: Any) -> str:
    """Hexadecimal xxh3_64 of bytes."""
    return xxhash.xxh3_64_hexdigest(data)


def lay_out(parts: Sequence[Part]) -> tuple[Header, bytes]:
    """Where parts go in a file, in their order, and the bytes that start it.

    Raises ValueError for a part that comes twice, one tensor with two shapes or dtypes, or more than
    `MAX_HEADER_BYTES` of names.
    """
    tensors: dict[str, dict[str, list[int]]] = {}
    values: dict[str, Any] = {}
    entries: list[Entry] = []
    offset = 0

    def add(name: str, dtype: str, numel: int, num_bytes: int, part: Part | None) -> None:
        nonlocal offset
        if name in values:
            raise ValueError(f"{name} comes twice")
        stop = offset + num_bytes
        values[name] = {"dtype": dtype, "shape": [numel], "data_offsets": [offset, stop]}
        entries.append(Entry(offset, num_bytes, part))
        offset = stop

    def align() -> None:
        if missing := -offset % _ALIGNMENT:
            add(f"{_PADDING}{len(entries)}", "U8", missing, missing, None)

    infos: dict[str, TensorInfo] = {}
    for part in parts:
        if infos.setdefault(part.name, part.info) != part.info:
            raise ValueError(f"{part.name} is both {infos[part.name]} and {part.info}")
        tensors[part.name] = {"shape": list(part.shape)}
        align()
        add(part.entry, DTYPE_NAMES[part.dtype], part.numel, part.num_bytes, part)
    align()
    count = sum(entry.num_blocks for entry in entries)
    values[_CHECKSUMS] = {"dtype": "U64", "shape": [count], "data_offsets": [offset, offset + 8 * count]}
    ours = {"format": FORMAT_VERSION, "block_bytes": BLOCK_BYTES, "tensors": tensors}
    values = {_METADATA: {_OURS: json.dumps(ours, separators=(",", ":"))}} | values
    text = json.dumps(values, separators=(",", ":")).encode()
    text += b" " * (-len(text) % _ALIGNMENT)
    if len(text) > MAX_HEADER_BYTES:
        raise ValueError(f"names of {len(parts)} parts take {len(text)} bytes: put them into several files")
    start = len(text).to_bytes(LENGTH_BYTES, "little") + text
    return Header(tuple(entries), len(start)), start


def header_length(start: bytes, file_bytes: int) -> int:
    """Bytes of length and header, by the first 8 bytes of a file. Raises ValueError for what cannot be."""
    length = int.from_bytes(start, "little")
    if len(start) < LENGTH_BYTES or not 2 <= length <= min(MAX_HEADER_BYTES, file_bytes - LENGTH_BYTES):
        raise ValueError(f"its header would have {length} bytes")
    return LENGTH_BYTES + length


def parse(data: bytes, file_bytes: int) -> Header:
    """The header of a file of `file_bytes` that starts with `data`, its length included.

    Raises ValueError that says what is wrong with it.
    """
    try:
        values = json.loads(data[LENGTH_BYTES:])
        header = _parsed(values, len(data))
    except ValueError:
        raise
    except (CheckpointError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise ValueError(f"its header is damaged ({type(error).__name__}: {error})") from error
    if header.file_bytes != file_bytes:
        raise ValueError(f"it has {file_bytes} bytes instead of the {header.file_bytes} of its header")
    return header


def _parsed(values: dict[str, Any], header_bytes: int) -> Header:
    ours = json.loads(values.pop(_METADATA)[_OURS])
    if ours["format"] != FORMAT_VERSION or ours["block_bytes"] != BLOCK_BYTES:
        raise ValueError(
            f"it has format {ours['format']!r} with blocks of {ours['block_bytes']!r} bytes; this version "
            f"reads format {FORMAT_VERSION} with {BLOCK_BYTES}"
        )
    table = values.pop(_CHECKSUMS)
    shapes = {
        name: tuple(_count(size) for size in tensor["shape"]) for name, tensor in ours["tensors"].items()
    }
    entries = sorted((_entry(name, value, shapes) for name, value in values.items()), key=_place)
    end = 0
    for entry in entries:
        if entry.offset != end:
            raise ValueError(f"its header leaves bytes {end} to {entry.offset} to nothing, or to two entries")
        end += entry.num_bytes
    header = Header(tuple(entries), header_bytes)
    if table["data_offsets"] != [end, end + header.table_bytes]:
        raise ValueError("its checksums do not follow its data, one per block")
    return header


def _place(entry: Entry) -> tuple[int, int]:
    return entry.offset, entry.num_bytes


def _entry(name: str, value: Mapping[str, Any], shapes: Mapping[str, tuple[int, ...]]) -> Entry:
    first, last = (_count(offset) for offset in value["data_offsets"])
    part = None
    if not name.startswith(_PADDING):
        if not (match := _ENTRY.fullmatch(name)):
            raise ValueError(f"its entry {name!r} is no part of a tensor")
        part = Part(match[1], DTYPES[value["dtype"]], shapes[match[1]], int(match[2]), int(match[3]))
    if part and (value["shape"] != [part.numel] or last - first != part.num_bytes):
        raise ValueError(f"its entry {name!r} has {last - first} bytes for a shape of {value['shape']}")
    if last < first:
        raise ValueError(f"its entry {name!r} ends before it starts")
    return Entry(first, last - first, part)


def _count(value: object) -> int:
    if isinstance(value, bool) or not isinstance(value, int) or value < 0:
        raise ValueError(f"{value!r} is not a count")
    return value
