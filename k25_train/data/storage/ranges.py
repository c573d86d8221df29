"""Neighbouring ranges of files, read by one request: each costs a store as much as some hundred KB."""

from collections.abc import Iterable
from typing import NamedTuple, Self

GAP_BYTES = 2**18
"""Bytes between two ranges that are read and dropped rather than asked for apart: about what comes in the 10
to 30 ms until a first byte does, at 10 to 25 MB/s per connection. Our choice."""
MAX_BYTES = 2**23
"""Of one request. Our choice: more would only hold memory."""


class Range(NamedTuple):
    """A stretch of a file."""

    name: str
    """The file's."""
    start: int
    """First byte."""
    stop: int
    """Behind the last byte."""

    @classmethod
    def of(cls, name: str, offset: int, num_bytes: int) -> Self:
        """Of some bytes from an offset."""
        return cls(name, offset, offset + num_bytes)


def coalesce(ranges: Iterable[Range], gap_bytes: int = GAP_BYTES, max_bytes: int = MAX_BYTES) -> list[Range]:
    """Ranges, sorted, that hold all of `ranges`: those of a file with small gaps are one, up to `max_bytes`.

    A range of more than that by itself is left as it is.
    """
    found: list[Range] = []
    for each in sorted(set(ranges)):
        last = found[-1] if found else None
        if (
            last is not None
            and each.name == last.name
            and each.start <= last.stop + gap_bytes
            and max(each.stop, last.stop) - last.start <= max_bytes
        ):
            found[-1] = last._replace(stop=max(each.stop, last.stop))
        else:
            found.append(each)
    return found
