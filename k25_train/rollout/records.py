"""Records of a journal as bytes: each can be read alone, and one that was cut short is seen to be.

    4 bytes   number of bytes that follow these eight
    4 bytes   CRC-32 of them
    4 bytes   length of the header
    …         header: JSON, with the type and length of each array under `arrays`
    …         the arrays, one behind the other

Numbers are little-endian.
"""

import json
import struct
import zlib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np

_FRAME = struct.Struct("<II")
_LENGTH = struct.Struct("<I")
MOST_BYTES = 2**30
"""Longest record, far above any response: a length beyond it is no length. Our choice."""
_TYPES = ("int32", "float32", "uint8")


@dataclass(frozen=True, slots=True)
class Record:
    """One entry."""

    header: Mapping[str, Any]
    """What it says; `kind` is always there."""
    arrays: Mapping[str, np.ndarray] = field(default_factory=dict)
    """Name -> [n], int32, float32 or uint8."""

    def to_bytes(self) -> bytes:
        """As it is written."""
        described = {name: [str(array.dtype), len(array)] for name, array in self.arrays.items()}
        header = json.dumps({**self.header, "arrays": described}, separators=(",", ":")).encode()
        parts = [_LENGTH.pack(len(header)), header, *(array.tobytes() for array in self.arrays.values())]
        body = b"".join(parts)
        return _FRAME.pack(len(body), zlib.crc32(body)) + body


def records_in(data: bytes) -> Iterator[tuple[Record, int]]:
    """The records of a file with the byte behind each; ends before the first that is cut short or damaged."""
    start = 0
    while start + _FRAME.size <= len(data):
        length, crc = _FRAME.unpack_from(data, start)
        stop = start + _FRAME.size + length
        if not _LENGTH.size <= length <= MOST_BYTES or stop > len(data):
            return
        body = data[start + _FRAME.size : stop]
        if zlib.crc32(body) != crc:
            return
        yield _record(body), stop
        start = stop


def is_cut_short(data: bytes, start: int) -> bool:
    """Whether what lies behind the last whole record is one that a kill has cut short, and nothing else: it
    reaches to the end of the file, or there are zeros alone, as file systems leave them after a power cut."""
    rest = data[start:]
    if len(rest) < _FRAME.size or not any(rest):
        return True
    length, _ = _FRAME.unpack_from(rest)
    return bool(_LENGTH.size <= length <= MOST_BYTES and _FRAME.size + length > len(rest))


def _record(body: bytes) -> Record:
    """A record whose bytes are whole. Raises ValueError or KeyError where it was never one."""
    (length,) = _LENGTH.unpack_from(body)
    position = _LENGTH.size + length
    header = json.loads(body[_LENGTH.size : position])
    arrays = {}
    for name, (dtype, count) in header.pop("arrays").items():
        if dtype not in _TYPES:
            raise ValueError(f"an array of type {dtype}")
        arrays[name] = np.frombuffer(body, dtype, count, position).copy()
        position += arrays[name].nbytes
    return Record(header, arrays)
