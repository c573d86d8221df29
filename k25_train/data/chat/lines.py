"""Lines of a stretch of a file, in bounded memory."""

from collections.abc import Iterator
from typing import NamedTuple

from k25_train.data.folder import DataFolder

MAX_LINE_BYTES = 2**26
"""Longest line that is read: a conversation of 16 million tokens, or with images in it. Our choice."""
_BLOCK_BYTES = 2**20
_BYTE_ORDER_MARK = b"\xef\xbb\xbf"


class Line(NamedTuple):
    """A line without its end."""

    number: int
    """Among the lines of the stretch, from 0 on."""
    offset: int
    """Its first byte in the file."""
    data: bytes | None
    """None for a line that is too long."""


def lines(folder: DataFolder, name: str, start: int, stop: int, max_bytes: int) -> Iterator[Line]:
    """The lines of a file that begin at `start` or behind it and before `stop`, blank ones included.

    Stretches that follow one another give each line once. Raises DataError if the file cannot be read.
    """
    blocks = _Blocks(folder, name, max(start - 1, 0))
    number = 0
    if start:
        # A line begins at `start` if the byte before ends one.
        blocks.skip_line()
    while blocks.position < stop and not blocks.at_end():
        offset = blocks.position
        data = blocks.line(max_bytes)
        if not offset and data is not None and data.startswith(_BYTE_ORDER_MARK):
            offset, data = len(_BYTE_ORDER_MARK), data.removeprefix(_BYTE_ORDER_MARK)
        yield Line(number, offset, data)
        number += 1


def num_lines_before(folder: DataFolder, name: str, offset: int) -> int:
    """How many lines of a file end before a byte."""
    blocks = range(0, offset, _BLOCK_BYTES)
    return sum(
        folder.read_range(name, start, min(_BLOCK_BYTES, offset - start)).count(b"\n") for start in blocks
    )


class _Blocks:
    """A file from a position on."""

    def __init__(self, folder: DataFolder, name: str, position: int) -> None:
        self._folder = folder
        self._name = name
        self.position = position
        """Of the next byte."""
        self._block = b""
        self._first = position

    def at_end(self) -> bool:
        """Whether there is no next byte."""
        if self.position >= self._first + len(self._block):
            self._first = self.position
            self._block = self._folder.read_range(self._name, self.position, _BLOCK_BYTES)
        return not self._block

    def line(self, max_bytes: int) -> bytes | None:
        """The next line, or None, in bounded memory, for one of more bytes."""
        parts: list[bytes] = []
        num_bytes = 0
        while not self.at_end():
            start = self.position - self._first
            end = self._block.find(b"\n", start)
            part = self._block[start:] if end < 0 else self._block[start:end]
            self.position += len(part) + (end >= 0)
            num_bytes += len(part)
            parts = [*parts, part] if num_bytes <= max_bytes else []
            if end >= 0:
                break
        return b"".join(parts) if num_bytes <= max_bytes else None

    def skip_line(self) -> None:
        """Go behind the next end of a line, or to the end of the file."""
        self.line(0)
