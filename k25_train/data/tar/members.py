"""Samples of a tar shard: members that follow one another and have the same stem."""

import re
from collections.abc import Callable, Iterator
from typing import NamedTuple

from k25_train.data.tar.headers import Member

READ_AHEAD_BYTES = 8 * 2**20
"""What one request of a pass over a shard fetches. Our choice; object stores need megabytes per request."""
_NAME = re.compile(r"((?:.*/|)[^.]+)[.]([^/]*)", re.DOTALL)
"""Stem and suffix, as webdataset and megatron-energon 7.4 split a name: at the first dot of the last part."""
_META = re.compile(r"__[^/]*__($|/)")
"""What megatron-energon 7.4 leaves out, such as `__meta__/`."""


class Group(NamedTuple):
    """The members of a sample."""

    stem: str
    members: dict[str, Member]
    """What follows the stem's dot -> the member."""
    twice: str
    """A name that two of its members have; empty if there is none."""


class Skip(NamedTuple):
    """What an index leaves out, and why."""

    shard: str
    """Name of the shard."""
    key: str
    """Stem of the sample; empty if it is the shard as such."""
    offset: int
    """Where it begins in the shard."""
    reason: str
    """Continues the sentence that names it."""

    def __str__(self) -> str:
        sample = f", sample {self.key!r}" if self.key else ""
        return f"{self.shard}{sample} (byte {self.offset}): {self.reason}"


def split_name(name: str) -> tuple[str, str] | None:
    """Stem and suffix; None for a member that belongs to no sample: hidden, without a dot, or meta data."""
    match = _NAME.fullmatch(name)
    return None if match is None or _META.match(name) else (match[1], match[2])


def groups(members: Iterator[Member]) -> Iterator[Group]:
    """Samples in their order. The last one comes before what `members` raises, unless that is within it."""
    group: Group | None = None
    for member in members:
        split = split_name(member.name.removeprefix("./"))
        if split is None:
            continue
        stem, suffix = split
        if group is None or group.stem != stem:
            if group is not None:
                yield group
            group = Group(stem, {}, "")
        if suffix in group.members:
            group = group._replace(twice=group.twice or member.name)
        group.members[suffix] = member
    if group is not None:
        yield group


class ReadAhead:
    """Reads a file from its beginning to its end in few large requests."""

    def __init__(self, read_range: Callable[[int, int], bytes], num_bytes: int) -> None:
        """`read_range`: (offset, number of bytes) -> the bytes, fewer at the end; `num_bytes`: the file's."""
        self._read_range, self._num_bytes = read_range, num_bytes
        self._windows: list[tuple[int, bytes]] = []

    def read(self, offset: int, num_bytes: int) -> bytes:
        """The bytes, fewer if the file ends before."""
        end = min(offset + num_bytes, self._num_bytes)
        for start, data in self._windows:
            if start <= offset < start + len(data):
                found = data[offset - start : end - start]
                # What goes over the end of a window goes on in the other one.
                position = offset + len(found)
                return found if position == end else found + self.read(position, end - position)
        if offset >= end:
            return b""
        wanted = min(max(end - offset, READ_AHEAD_BYTES), self._num_bytes - offset)
        data = self._read_range(offset, wanted)
        # A sample is read after the header behind it was: the window before is still needed.
        self._windows = [(offset, data), *self._windows[:1]]
        return data[: end - offset]
