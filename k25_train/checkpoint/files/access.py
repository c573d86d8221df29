"""Bytes of files: of a local or shared disk by pread, of an object store by ranged requests."""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Protocol

import numpy as np
from numpy.typing import NDArray
from upath import UPath

Buffer = NDArray[np.uint8]


class ShortFileError(OSError):
    """A file ends before what was to be read of it."""


class OpenFile(Protocol):
    """A file of which ranges are read."""

    def read_into(self, offset: int, buffer: Buffer) -> None:
        """Fill `buffer` with the bytes from `offset`. Raises ShortFileError if there are fewer, OSError."""


@contextmanager
def opened(path: Path | UPath) -> Iterator[OpenFile]:
    """A file for reading ranges. Raises OSError."""
    if not isinstance(path, Path):
        yield _RemoteFile(path)
        return
    descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    try:
        yield _LocalFile(descriptor)
    finally:
        os.close(descriptor)


def read_bytes(file: OpenFile, offset: int, count: int) -> bytes:
    """A few bytes. Raises ShortFileError if there are fewer, OSError."""
    buffer = np.empty(count, np.uint8)
    file.read_into(offset, buffer)
    return buffer.tobytes()


def size_of(path: Path | UPath) -> int:
    """Size of a file in bytes. Raises OSError."""
    return int(path.stat().st_size)


class _LocalFile:
    def __init__(self, descriptor: int) -> None:
        self._descriptor = descriptor

    def read_into(self, offset: int, buffer: Buffer) -> None:
        missing = memoryview(buffer)
        while len(missing):
            count = os.preadv(self._descriptor, [missing], offset)
            if not count:
                raise ShortFileError(f"it ends at byte {offset}")
            missing, offset = missing[count:], offset + count


class _RemoteFile:
    def __init__(self, path: UPath) -> None:
        self._path = path

    def read_into(self, offset: int, buffer: Buffer) -> None:
        if not len(buffer):
            return
        stop = offset + len(buffer)
        try:
            data = self._path.fs.cat_file(self._path.path, start=offset, end=stop)
        except OSError as error:
            # A store refuses a range that starts beyond the end of its object.
            if (size := size_of(self._path)) < stop:
                raise ShortFileError(f"it ends at byte {size}") from error
            raise
        if len(data) != len(buffer):
            raise ShortFileError(f"it ends at byte {offset + len(data)}")
        buffer[:] = np.frombuffer(data, np.uint8)
