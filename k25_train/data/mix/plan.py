"""The plan of a global batch, made from the index alone: sequences, and pieces of documents in each.

A step has some hundred thousand pieces, so it is arrays; what a rank reads of it becomes objects when it is
looked at.
"""

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple, Protocol, overload

import numpy as np

from k25_train.data.decode.items import MediaItem, PlannedMedia
from k25_train.data.formats.records import SampleRecord
from k25_train.data.mix.ragged import sums_of
from k25_train.data.mix.sequences import Sequences
from k25_train.data.served import Served
from k25_train.plan.batch_sizes import BatchSizes
from parallel.dep.grid import Grid


@dataclass(frozen=True, slots=True, kw_only=True)
class PlannedPiece:
    """A stretch of a document in a sequence: all of it if it has media, as such are not cut."""

    record: SampleRecord
    """The sample."""
    start: int
    """First token of the stretch, counted in the document."""
    length: int
    """Tokens of the stretch."""
    media: tuple[PlannedMedia, ...]
    """The images and videos of the sample, in order."""

    @property
    def items(self) -> tuple[MediaItem, ...]:
        """Vision items in the order of their placeholders."""
        return tuple(item for media in self.media for item in media.items)


@dataclass(frozen=True, slots=True, kw_only=True)
class SequencePlan:
    """One packed sequence; what its pieces leave of `seq_len` is padding."""

    source: str
    """Name of the source of all its samples."""
    pieces: tuple[PlannedPiece, ...]
    """Pieces from the first token on."""

    @property
    def items(self) -> tuple[MediaItem, ...]:
        """Vision items in the order of their placeholders."""
        return tuple(item for piece in self.pieces for item in piece.items)

    @property
    def num_tokens(self) -> int:
        """Tokens without padding."""
        return sum(piece.length for piece in self.pieces)


class SampleItem(NamedTuple):
    """A vision item of the global batch in its sample."""

    source: str
    """Name of its source."""
    record: SampleRecord
    media: PlannedMedia
    position: int
    """Position of the item among those of its image or video."""


class PieceSource(Protocol):
    """Makes the records of one source."""

    @property
    def name(self) -> str:
        """As `data.sources` names it."""

    def record(self, item: int) -> SampleRecord:
        """The sample of an item."""

    def media(self, record: SampleRecord, item: int, epoch: int) -> tuple[PlannedMedia, ...]:
        """Its images and videos with their items, and how they are changed in an epoch."""


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class StepPlan:
    """All sequences of a step's global batch, the same on every rank."""

    step: int
    """Number of the step, counted from 0; 0 for an evaluation."""
    source: np.ndarray
    """[S] int64: the source of each sequence, by its position in `sources`. Sequences are in the order of the
    global batch, of which each replica computes a contiguous share."""
    sequences_of: Sequences
    """Their pieces, by the items of their sources."""
    sources: Sequence[PieceSource]
    """What makes records of items."""

    @property
    def num_sequences(self) -> int:
        """S."""
        return len(self.source)

    @property
    def sequences(self) -> Sequence[SequencePlan]:
        """The sequences, each made when it is looked at."""
        return _LazySequences(self, range(self.num_sequences))

    @property
    def items(self) -> tuple[MediaItem, ...]:
        """Vision items of the whole batch, sequence by sequence; makes all of them."""
        return tuple(item for sequence in self.sequences for item in sequence.items)

    def grids(self) -> list[Grid]:
        """Patches of the vision items of the whole batch, sequence by sequence."""
        return [Grid(*grid) for grid in self.sequences_of.grids.tolist()]

    def first_items(self) -> np.ndarray:
        """[S + 1] int64: where the vision items of each sequence begin."""
        return self.sequences_of.vision_offsets[self.sequences_of.offsets]

    def vision_item(self, number: int) -> SampleItem:
        """One of the vision items of the whole batch, in its sample."""
        arrays = self.sequences_of
        piece = int(np.searchsorted(arrays.vision_offsets, number, side="right")) - 1
        sequence = int(np.searchsorted(arrays.offsets, piece, side="right")) - 1
        source = self.sources[self.source[sequence]]
        record = source.record(int(arrays.items[piece]))
        position = number - int(arrays.vision_offsets[piece])
        for media in source.media(record, int(arrays.items[piece]), int(arrays.epochs[piece])):
            if position < len(media.items):
                return SampleItem(source.name, record, media, position)
            position -= len(media.items)
        raise AssertionError(f"{record.key} has fewer vision items than were planned")

    def sizes(self) -> BatchSizes:
        """What the batch amounts to."""
        lengths = self.sequences_of.lengths
        frames, rows, columns = self.sequences_of.grids.astype(np.int64).T
        num_patches = frames * rows * columns
        return BatchSizes(
            num_tokens=int(lengths.sum()),
            num_token_pairs=int((lengths * (lengths + 1) // 2).sum()),
            num_items=len(num_patches),
            num_vision_tokens=int(((rows // 2) * (columns // 2)).sum()),
            num_patches=int(num_patches.sum()),
            num_patch_pairs=int((num_patches**2).sum()),
        )

    def served(self) -> dict[str, Served]:
        """What each source gives to the batch."""
        tokens = sums_of(self.sequences_of.lengths, self.sequences_of.offsets)
        of_sources = np.bincount(self.source, weights=tokens, minlength=len(self.sources)).tolist()
        names = [source.name for source in self.sources]
        return {
            name: Served(int(count)) for name, count in sorted(zip(names, of_sources, strict=True)) if count
        }

    def sequence(self, number: int) -> SequencePlan:
        """One of the sequences."""
        arrays, source = self.sequences_of, self.sources[self.source[number]]
        pieces = slice(*arrays.offsets[number : number + 2].tolist())
        planned = []
        for item, epoch, start, length in zip(
            arrays.items[pieces].tolist(),
            arrays.epochs[pieces].tolist(),
            arrays.starts[pieces].tolist(),
            arrays.lengths[pieces].tolist(),
            strict=True,
        ):
            record = source.record(item)
            media = source.media(record, item, epoch)
            planned.append(PlannedPiece(record=record, start=start, length=length, media=media))
        return SequencePlan(source=source.name, pieces=tuple(planned))


class _LazySequences(Sequence[SequencePlan]):
    """Sequences of a plan, made when they are looked at and not kept."""

    def __init__(self, plan: StepPlan, numbers: range) -> None:
        self._plan = plan
        self._numbers = numbers

    def __len__(self) -> int:
        return len(self._numbers)

    @overload
    def __getitem__(self, index: int) -> SequencePlan: ...
    @overload
    def __getitem__(self, index: slice) -> Sequence[SequencePlan]: ...
    def __getitem__(self, index: int | slice) -> SequencePlan | Sequence[SequencePlan]:
        if isinstance(index, slice):
            return _LazySequences(self._plan, self._numbers[index])
        return self._plan.sequence(self._numbers[index])


def media_of(sequences: Iterable[SequencePlan]) -> Iterator[tuple[str, SampleRecord, PlannedMedia]]:
    """Every image and video of the sequences, with source and sample, in the order of their placeholders."""
    for sequence in sequences:
        for piece in sequence.pieces:
            for media in piece.media:
                yield sequence.source, piece.record, media
