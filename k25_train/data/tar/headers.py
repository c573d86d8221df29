"""The members of a tar file by their headers, in one pass over its bytes.

Sources: POSIX.1-2017, pax (ustar and extended headers); GNU tar's manual, "Basic Tar Format" (long names,
sizes in base 256). Python's tarfile takes an archive that ends between two members for a whole one and needs
a file to seek in; here a shard that may have lost its end is told, and a pass over an object store takes few
requests.
"""

import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import NamedTuple

from k25_train.errors import DataError

BLOCK_BYTES = 512
MAX_EXTENSION_BYTES = 2**20
"""Longest extended header: names and a few numbers. Our choice; more is damage or an attack on memory."""
MAX_SIZE_DIGITS = 20
"""Of a size in an extended header: 2^64 has as many."""
_CONTROLS = re.compile(r"[\x00-\x1f\x7f-\x9f]")
_COMPRESSED = {
    b"\x1f\x8b": "gzip",
    b"BZh": "bzip2",
    b"\xfd7zXZ": "xz",
    b"\x28\xb5\x2f\xfd": "zstd",
    b"\x04\x22\x4d\x18": "lz4",
}
_FILES = (b"0", b"\0", b"7")
_WITHOUT_CONTENT = (b"1", b"2", b"3", b"4", b"5", b"6")
"""Links, devices, folders and pipes, whatever size they state."""
_LONG_NAME, _PAX = b"L", (b"x", b"X")
_EXTENSIONS = (_LONG_NAME, b"K", *_PAX, b"g")
"""What says more of the member behind it: long names and link names of GNU, pax, pax for all members."""
_REFUSED = {
    b"S": "has a sparse member; write it again without --sparse",
    b"M": "is one volume of several; write it again as one file",
}

ReadAt = Callable[[int, int], bytes]
"""(offset, number of bytes) -> the bytes, fewer if the file ends before."""


class Member(NamedTuple):
    """A regular file in a tar file."""

    name: str
    """With its folders, as stated."""
    start: int
    """First byte of its first header."""
    offset: int
    """First byte of its content."""
    num_bytes: int
    """Length of its content."""

    @property
    def end(self) -> int:
        """First byte behind its content."""
        return self.offset + self.num_bytes


class TarError(DataError):
    """What is wrong with a tar file from some byte on; members before it are sound."""

    def __init__(self, reason: str, offset: int, *, is_cut: bool = False) -> None:
        """`reason` continues the sentence that names the file; `is_cut`: it ends within a member."""
        super().__init__(reason)
        self.reason, self.offset, self.is_cut = reason, offset, is_cut


@dataclass(slots=True)
class _Extended:
    """What extended headers say of the member that follows."""

    start: int
    name: str | None = None
    size: int | None = None


def scan_members(read_at: ReadAt, num_bytes: int, *, is_part: bool = False) -> Iterator[Member]:
    """Regular members of a tar file of `num_bytes`, in their order; folders, links and devices are left out.

    `is_part`: it is a stretch of a file, from the header of a member to the end of another, without end mark.
    Raises TarError, after all members before it, where the file is cut short, damaged, compressed, has sparse
    members, or ends without the block of zeros that marks an end.
    """
    position = 0
    extended = _Extended(0)
    while not is_part or position < num_bytes:
        block = read_at(position, BLOCK_BYTES) if position < num_bytes else b""
        for magic, name in _COMPRESSED.items():
            if position == 0 and block.startswith(magic):
                raise TarError(f"is compressed ({name}); decompress it, members are read in place", 0)
        if len(block) < BLOCK_BYTES:
            raise _cut_fault(position, num_bytes)
        if not any(block):
            return
        size, kind = _checked(block, position)
        content = position + BLOCK_BYTES
        if kind in _REFUSED:
            raise TarError(_REFUSED[kind], extended.start)
        if kind in _EXTENSIONS:
            _extend(extended, kind, _extension(read_at, content, size, num_bytes))
            position = _after(content, size)
            continue
        if kind in _WITHOUT_CONTENT:
            size = 0
        elif extended.size is not None:
            size = extended.size
        if content + size > num_bytes:
            raise _cut_fault(extended.start, num_bytes)
        name = extended.name if extended.name is not None else _name(block)
        if kind in _FILES and not name.endswith("/"):
            yield Member(name, extended.start, content, size)
        position = _after(content, size)
        extended = _Extended(position)


def _after(content: int, size: int) -> int:
    return content + -(-size // BLOCK_BYTES) * BLOCK_BYTES


def _cut_fault(position: int, num_bytes: int) -> TarError:
    if num_bytes == 0:
        return TarError("is empty", 0, is_cut=True)
    if position == num_bytes:
        return TarError("ends without its end mark, so it may be cut short; copy or write it again", position)
    return TarError(
        f"is cut short at byte {num_bytes}, within a member; copy it again", position, is_cut=True
    )


def _checked(block: bytes, position: int) -> tuple[int, bytes]:
    """Size and type of a header. Raises TarError if the block is none."""
    # The checksum counts its own field as blanks; very old writers summed signed bytes.
    plain = block[:148] + b" " * 8 + block[156:]
    sums = (sum(plain), sum(plain) - 256 * sum(byte > 127 for byte in plain))
    try:
        is_header = _number(block[148:156]) in sums
        size = _number(block[124:136])
    except ValueError:
        is_header, size = False, 0
    if not is_header:
        where = "is no tar file" if position == 0 else f"is damaged at byte {position}"
        raise TarError(f"{where}: no header is there; copy or write it again", position)
    return size, block[156:157]


def _number(field: bytes) -> int:
    """Octal digits, or base 256 for sizes from 8 GiB on. Raises ValueError."""
    if field[0] == 0x80:
        return int.from_bytes(field[1:], "big")
    digits = field.split(b"\0")[0].strip()
    if not digits.isdigit():
        if digits:
            raise ValueError(f"{field!r} is no number")
        return 0
    return int(digits, 8)


def _name(block: bytes) -> str:
    name = block[:100].split(b"\0")[0]
    is_posix = block[257:263] == b"ustar\0"
    prefix = block[345:500].split(b"\0")[0] if is_posix else b""
    return _text(prefix + b"/" + name if prefix else name)


def _text(name: bytes) -> str:
    # Names go to indexes, which are UTF-8, and to terminals: bytes that are neither are shown as `\\xe9`.
    return _CONTROLS.sub(lambda found: f"\\x{ord(found[0]):02x}", name.decode(errors="backslashreplace"))


def _extension(read_at: ReadAt, offset: int, size: int, num_bytes: int) -> bytes:
    if offset + size > num_bytes:
        raise _cut_fault(offset, num_bytes)
    if size > MAX_EXTENSION_BYTES:
        raise TarError(f"has an extended header of {size} bytes at byte {offset}", offset)
    return read_at(offset, size)


def _extend(extended: _Extended, kind: bytes, content: bytes) -> None:
    if kind == _LONG_NAME:
        extended.name = _text(content.split(b"\0")[0])
    elif kind in _PAX:
        for key, value in _pax_records(content, extended.start):
            if key == b"path":
                extended.name = _text(value)
            elif key == b"size":
                extended.size = int(value)
            elif key.startswith(b"GNU.sparse"):
                raise TarError("has a sparse member; write it again without --sparse", extended.start)


def _pax_records(content: bytes, position: int) -> Iterator[tuple[bytes, bytes]]:
    """`LENGTH KEY=VALUE\\n`, LENGTH counting all of it."""
    while content:
        length_text, _, _ = content.partition(b" ")
        length = int(length_text) if length_text.isdigit() and len(length_text) < 10 else 0
        record = content[len(length_text) + 1 : length]
        key, equals, value = record.partition(b"=")
        is_sound = length <= len(content) and equals and value.endswith(b"\n")
        if not is_sound or (key == b"size" and not _is_size(value[:-1])):
            raise TarError(f"is damaged at byte {position}: its extended header is malformed", position)
        yield key, value[:-1]
        content = content[length:]


def _is_size(digits: bytes) -> bool:
    return digits.isdigit() and len(digits) <= MAX_SIZE_DIGITS
