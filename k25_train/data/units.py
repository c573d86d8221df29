"""What can be read independently of all else: the words of a micro-batch, an image, items of a video."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

from k25_train.config.vision import VisionConfig
from k25_train.data.batch import MicroBatch, Reads
from k25_train.data.decode.items import PlannedMedia
from k25_train.data.decode.media import MediaPatches
from k25_train.data.mix.plan import SequencePlan
from k25_train.data.storage.ranges import Range

_TOKEN_BYTES = 40
"""Of a micro-batch's tensors without pixels, per token, generously: tokens, labels, mask, source."""

GROUP_IMAGES = 16
"""Most images of a group. Our choice: DALI gains nothing measurable from more."""
GROUP_BYTES = 2**21
"""Most bytes of a group's patches, so that workers share even few images evenly. Our choice."""


@dataclass(frozen=True, slots=True)
class WordsUnit:
    """The words of a micro-batch; its result is a `MicroBatch` without pixels."""

    sequences: tuple[SequencePlan, ...]
    """Of the micro-batch."""
    reads: Reads
    """What is asked for; pixels are not."""

    def result_bytes(self, vision: VisionConfig) -> int:
        """About what the result takes."""
        return _TOKEN_BYTES * sum(piece.length for each in self.sequences for piece in each.pieces)

    def places(self) -> str:
        """The samples, as messages say where they are."""
        pieces = [piece.record for each in self.sequences for piece in each.pieces]
        return ", ".join(sorted({f"{record.shard} at byte {record.offset}" for record in pieces}))

    def stretches(self) -> Iterator[tuple[str, Range]]:
        """Source and stretch of a shard of each sample."""
        for each in self.sequences:
            for piece in each.pieces:
                yield each.source, Range.of(piece.record.shard, piece.record.offset, piece.record.num_bytes)


@dataclass(frozen=True, slots=True)
class MediaUnit:
    """An image or video; its result is a `MediaPatches`."""

    source: str
    """Name of its source."""
    media: PlannedMedia
    """What is decoded."""
    positions: tuple[int, ...] | None
    """Of its items those that are wanted; None is all."""

    def result_bytes(self, vision: VisionConfig) -> int:
        """About what the result takes."""
        items = self.media.items
        chosen = range(len(items)) if self.positions is None else self.positions
        return 3 * vision.patch_size**2 * sum(items[position].num_patches for position in chosen)

    def places(self) -> str:
        """The file, as messages say where it is."""
        segment = self.media.segment
        return f"{segment.shard} at byte {segment.offset} ({segment.type}, .{segment.format})"

    def stretches(self) -> Iterator[tuple[str, Range]]:
        """Source and stretch of a shard."""
        segment = self.media.segment
        yield self.source, Range.of(segment.shard, segment.offset, segment.num_bytes)


@dataclass(frozen=True, slots=True)
class MediaGroup:
    """Small images that are read and decoded together; its result is a `MediaPatches` of each, in order."""

    units: tuple[MediaUnit, ...]
    """The images."""

    def result_bytes(self, vision: VisionConfig) -> int:
        """About what the result takes."""
        return sum(unit.result_bytes(vision) for unit in self.units)

    def places(self) -> str:
        """The files, as messages say where they are."""
        return ", ".join(unit.places() for unit in self.units)

    def stretches(self) -> Iterator[tuple[str, Range]]:
        """Source and stretch of a shard of each."""
        return (each for unit in self.units for each in unit.stretches())


Unit = WordsUnit | MediaUnit | MediaGroup
Result = MicroBatch | MediaPatches | tuple[MediaPatches, ...]


@dataclass(frozen=True, slots=True)
class Read:
    """A unit that was read."""

    result: Result
    """Arrays may lie in memory that a worker writes again once they are dropped."""
    skipped: Mapping[str, str]
    """Samples that were found unusable elsewhere and are not counted here yet: where they are -> why."""


class UnitReading(Protocol):
    """Who reads units: this process, or workers under it."""

    def read(self, units: Sequence[Unit]) -> Iterator[Read]:
        """Each unit's result, in order. Leave what was yielded before taking much more: it is memory that
        is in use. Raises `DataError` for what cannot be read."""


class ReadHere:
    """Without workers: one unit after the other, when it is asked for."""

    def __init__(self, read: Callable[[Unit], Result]) -> None:
        """`read` counts what cannot be used itself."""
        self._read = read

    def read(self, units: Sequence[Unit]) -> Iterator[Read]:
        """See `UnitReading`."""
        return (Read(self._read(unit), {}) for unit in units)


class GroupedReading:
    """Reads through another, small images by the group: a message per image costs as much as decoding it, and
    DALI works on batches."""

    def __init__(self, reading: UnitReading, vision: VisionConfig) -> None:
        self._reading = reading
        self._vision = vision

    def read(self, units: Sequence[Unit]) -> Iterator[Read]:
        """See `UnitReading`: a result for each of `units`, none of which is a group."""
        for read in self._reading.read(grouped(units, self._vision)):
            if not isinstance(read.result, tuple):
                yield read
                continue
            skipped = read.skipped
            for result in read.result:
                yield Read(result, skipped)
                skipped = {}


def grouped(units: Sequence[Unit], vision: VisionConfig) -> list[Unit]:
    """The units in their order, with runs of small images as groups of at most `GROUP_IMAGES` and
    `GROUP_BYTES`."""
    found: list[Unit] = []
    group: list[MediaUnit] = []
    num_bytes = 0

    def close_group() -> None:
        nonlocal num_bytes
        found.extend(group if len(group) < 2 else [MediaGroup(tuple(group))])
        group.clear()
        num_bytes = 0

    for unit in units:
        size = unit.result_bytes(vision)
        is_image = isinstance(unit, MediaUnit) and unit.media.segment.type == "image"
        if not is_image or len(group) == GROUP_IMAGES or num_bytes + size > GROUP_BYTES:
            close_group()
        if isinstance(unit, MediaUnit) and is_image:
            group.append(unit)
            num_bytes += size
        else:
            found.append(unit)
    close_group()
    return found
