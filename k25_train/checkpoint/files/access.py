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


class OpenFile(Protocol):
    """A file of which ranges are read."""

    def read_into(self, offset: int, buffer: Buffer) -> None:
        """Fill `buffer` with the bytes from `offset`. Raises OSError if there are fewer."""


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
    """A few bytes. Raises OSError if there are fewer."""
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
                raise ends_at(offset)
            missing, offset = missing[count:], offset + count


class _RemoteFile:
    def __init__(self, path: UPath) -> None:
        self._path = path

    def read_into(self, offset: int, buffer: Buffer) -> None:
        if not len(buffer):
            return
        data = self._path.fs.cat_file(self._path.path, start=offset, end=offset + len(buffer))
        if len(data) != len(buffer):
            raise ends_at(offset + len(data))
        buffer[:] = np.frombuffer(data, np.uint8)


def ends_at(offset: int) -> OSError:
    """What a file that ends too early raises."""
    return OSError(f"it ends at byte {offset}")
