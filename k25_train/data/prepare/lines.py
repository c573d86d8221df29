"""Lines of a stretch of a text file, plain or compressed, with bounded memory."""

import io
from collections.abc import Iterator
from typing import Any, NamedTuple

from k25_train.data.folder import locate
from k25_train.data.prepare.inputs import InputFile
from k25_train.data.prepare.units import Unit
from k25_train.data.storage.attempts import describe
from k25_train.errors import DataError

MAX_LINE_BYTES = 512 * 2**20
"""Longest line that is read; a longer one is a file of another kind. Our choice, so that a document's bytes
and tokens fit the 32 bits that indexes have for them."""
_READ_BYTES = 2**20
_REMOTE_READ_BYTES = 8 * 2**20


class ReadError(Exception):
    """Reading an input failed in a way that may pass."""


class Line(NamedTuple):
    """A line without its line break."""

    data: bytes | None
    """None if it is too long to be read."""
    is_cut: bool
    """Whether the file ends within it."""
    end: int
    """Bytes of the unit (of the uncompressed text, if it is compressed) up to its end."""


def lines(file: InputFile, unit: Unit) -> Iterator[Line]:
    """The lines that begin in a unit.

    Raises:
        DataError: compressed data are damaged or cut short.
        ReadError: the file system failed.
    """
    fs, place = locate(file.url, "INPUT")
    try:
        if "file" in fs.protocol:
            raw: Any = open(place, "rb", buffering=_READ_BYTES)  # noqa: SIM115
        else:
            raw = fs.open(place, mode="rb", block_size=_REMOTE_READ_BYTES)
    except Exception as error:  # file systems of fsspec raise what their libraries do
        raise ReadError(f"{file.url}: cannot be opened ({describe(error)})") from error
    with raw:
        stream = _decompressed(raw, file.codec) if file.codec else raw
        if "file" not in fs.protocol and not file.codec:
            stream = io.BufferedReader(raw, _READ_BYTES)
        try:
            yield from _lines(stream, unit.start, None if file.codec else unit.stop)
        except (DataError, ReadError, GeneratorExit):
            raise
        except Exception as error:  # as above, and Arrow's
            if file.codec and isinstance(error, OSError) and error.errno is None:
                raise DataError(
                    f"{file.url}: its {file.codec} data are damaged or cut short ({error}). Restore it, or "
                    "leave it out."
                ) from error
            raise ReadError(f"{file.url}: cannot be read ({describe(error)})") from error


def _lines(stream: Any, start: int, stop: int | None) -> Iterator[Line]:
    # A line belongs to the unit in which it begins: the byte before tells whether one does at `start`.
    position = start
    if start:
        stream.seek(start - 1)
        position = start - 1 + _skip_line(stream)
    while stop is None or position < stop:
        line = stream.readline(MAX_LINE_BYTES + 1)
        if not line:
            return
        position += len(line)
        if len(line) > MAX_LINE_BYTES and not line.endswith(b"\n"):
            position += _skip_line(stream)
            yield Line(None, False, position - start)
            continue
        whole = line.endswith(b"\n")
        yield Line(line[:-1] if whole else line, not whole, position - start)


def _skip_line(stream: Any) -> int:
    """Read to behind the next line break; returns the number of bytes."""
    skipped = 0
    while part := stream.readline(_READ_BYTES):
        skipped += len(part)
        if part.endswith(b"\n"):
            break
    return skipped


def _decompressed(raw: Any, codec: str) -> io.BufferedReader:
    import pyarrow as pa  # type: ignore[import-untyped]

    return io.BufferedReader(
        _ArrowStream(pa.CompressedInputStream(pa.PythonFile(raw, "r"), codec)), _READ_BYTES
    )


class _ArrowStream(io.RawIOBase):
    """Arrow's stream as Python's buffers want it."""

    def __init__(self, stream: Any) -> None:
        self._stream = stream

    def readable(self) -> bool:
        """True: that is what it is for."""
        return True

    def readinto(self, buffer: Any) -> int:
        """Fill the buffer as far as data come; 0 at the end."""
        data = self._stream.read(len(buffer))
        buffer[: len(data)] = data
        return len(data)
