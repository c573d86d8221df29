"""The plan of a global batch, made from the index alone: sequences, and pieces of documents in each."""

from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass

from k25_train.data.decode.items import MediaItem, PlannedMedia
from k25_train.data.formats.records import SampleRecord
from k25_train.data.served import Served
from k25_train.plan.batch_sizes import BatchSizes


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

    kind: str
    """Kind of all its samples."""
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


@dataclass(frozen=True, slots=True, kw_only=True)
class StepPlan:
    """All sequences of a step's global batch, the same on every rank."""

    step: int
    """Number of the step, counted from 0; 0 for an evaluation."""
    sequences: tuple[SequencePlan, ...]
    """Sequences in the order of the global batch, of which each replica computes a contiguous share."""

    @property
    def items(self) -> tuple[MediaItem, ...]:
        """Vision items of the whole batch, sequence by sequence."""
        return tuple(item for sequence in self.sequences for item in sequence.items)

    def sizes(self) -> BatchSizes:
        """What the batch amounts to; adds up all pieces and items, so call it once."""
        lengths = (piece.length for sequence in self.sequences for piece in sequence.pieces)
        return BatchSizes.of(lengths, (item.grid_thw for item in self.items))

    def served(self) -> dict[str, Served]:
        """What each source gives to the batch."""
        tokens = Counter[str]()
        for sequence in self.sequences:
            tokens[sequence.kind] += sequence.num_tokens
        return {name: Served(count) for name, count in sorted(tokens.items())}


def media_of(sequences: Iterable[SequencePlan]) -> Iterator[tuple[SampleRecord, PlannedMedia]]:
    """Every image and video of the sequences, with its sample, in the order of their placeholders."""
    for sequence in sequences:
        for piece in sequence.pieces:
            for media in piece.media:
                yield piece.record, media
