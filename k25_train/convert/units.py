"""Our tensors cut into units of work, each of which becomes one file; and the pieces that a unit is read in.

Units depend on the tensors alone, not on workers, nodes or memory: whoever goes on with an import finds the
same.
"""

from bisect import bisect_right
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import accumulate
from math import prod

from k25_train.checkpoint.files.parts import Part
from k25_train.convert.mapping import PlannedTensor, Segment
from k25_train.convert.names import Change

UNIT_BYTES = 2**30
"""Bytes of a unit's file: 2,000 files for 1T parameters, and seconds of work, so that an interruption costs
little. Our choice."""


@dataclass(frozen=True, slots=True)
class UnitPart:
    """A range of one of our tensors."""

    tensor: PlannedTensor
    """The whole tensor."""
    part: Part
    """The range."""


@dataclass(frozen=True, slots=True)
class Unit:
    """What one worker writes at a time."""

    number: int
    """Its place among all units."""
    parts: tuple[UnitPart, ...]
    """In the order of the file."""

    @property
    def num_bytes(self) -> int:
        """Bytes of its tensors."""
        return sum(each.part.num_bytes for each in self.parts)

    @property
    def file_name(self) -> str:
        """Of its file in the checkpoint."""
        return f"rank_{self.number:05d}_0.safetensors"


@dataclass(frozen=True, slots=True)
class Piece:
    """What is read at once: a range of a segment."""

    segment: Segment
    """What it is of."""
    start: int
    """First element, from the start of the segment."""
    stop: int
    """One after the last."""


def cut(tensors: Sequence[PlannedTensor], unit_bytes: int) -> list[Unit]:
    """Units of about `unit_bytes`, in the order of the tensors.

    A tensor is cut between rows that can be read alone. A segment that is changed as a whole is not cut.
    """
    units: list[Unit] = []
    parts: list[UnitPart] = []
    room = unit_bytes

    def close() -> None:
        nonlocal room
        if parts:
            units.append(Unit(len(units), tuple(parts)))
        parts.clear()
        room = unit_bytes

    for tensor in tensors:
        borders = list(accumulate((segment.numel for segment in tensor.segments), initial=0))
        start = 0
        while start < borders[-1]:
            stop = _border_before(tensor, borders, start + room // tensor.dtype.itemsize)
            if stop <= start and parts:
                close()
                continue
            stop = max(stop, _border_after(tensor, borders, start))
            part = Part(tensor.name, tensor.dtype, tensor.shape, start, stop)
            parts.append(UnitPart(tensor, part))
            room -= part.num_bytes
            start = stop
            if room <= 0:
                close()
    close()
    return units


def pieces(each: UnitPart, max_elements: int) -> Iterator[Piece]:
    """The pieces of a part, in order: at most `max_elements` each, one row, or a segment that is changed."""
    first = 0
    for segment in each.tensor.segments:
        start, stop = max(each.part.start - first, 0), min(each.part.stop - first, segment.numel)
        first += segment.numel
        if segment.change is not Change.none and start < stop:
            assert (start, stop) == (0, segment.numel), f"{segment.source.name} is cut"
            yield Piece(segment, start, stop)
            continue
        step = max(1, max_elements // segment.source.row_numel) * segment.source.row_numel
        for begin in range(start, stop, step):
            yield Piece(segment, begin, min(begin + step, stop))


def largest_piece(tensors: Sequence[PlannedTensor], max_elements: int) -> int:
    """Most elements that are read at once."""
    return max(
        (
            max(segment.numel, prod(segment.source.shape))
            if segment.change is not Change.none
            else min(segment.numel, max(max_elements, segment.source.row_numel))
            for tensor in tensors
            for segment in tensor.segments
        ),
        default=0,
    )


def _border_before(tensor: PlannedTensor, borders: list[int], place: int) -> int:
    """The last element up to `place` at which the tensor may be cut."""
    if place >= borders[-1]:
        return borders[-1]
    number = bisect_right(borders, place) - 1
    segment, offset = tensor.segments[number], place - borders[number]
    if segment.change is not Change.none:
        return borders[number]
    return place - offset % segment.source.row_numel


def _border_after(tensor: PlannedTensor, borders: list[int], place: int) -> int:
    """The first element after `place`, at which the tensor may be cut already."""
    number = bisect_right(borders, place) - 1
    segment = tensor.segments[number]
    step = segment.source.row_numel if segment.change is Change.none else segment.numel
    return min(place + step, borders[number + 1])
