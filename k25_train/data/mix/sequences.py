"""Packed sequences as arrays: pieces of documents, and the vision items of each."""

from dataclasses import dataclass

import numpy as np

from k25_train.data.mix.ragged import offsets_of, positions_of


@dataclass(frozen=True, slots=True, eq=False)
class Sequences:
    """S packed sequences with P pieces of documents, whose vision items are I."""

    items: np.ndarray
    """[P] int64: item of the source that each piece is of."""
    starts: np.ndarray
    """[P] int64: first token of the piece in its document."""
    lengths: np.ndarray
    """[P] int64: tokens of the piece."""
    offsets: np.ndarray
    """[S + 1] int64: where the pieces of each sequence begin."""
    vision_offsets: np.ndarray
    """[P + 1] int64: where the vision items of each piece begin."""
    grids: np.ndarray
    """[I, 3] int32: frames, rows and columns of patches of each vision item."""
    epochs: np.ndarray
    """[P] int32: epoch of its source that each piece is of."""

    @classmethod
    def joined(cls, parts: list["Sequences"]) -> "Sequences":
        """Those of all parts, one after another."""
        if len(parts) == 1:
            return parts[0]
        names = ("items", "starts", "lengths", "grids", "epochs")
        values = {name: np.concatenate([getattr(part, name) for part in parts]) for name in names}
        counts = np.concatenate([np.diff(part.offsets) for part in parts])
        of_pieces = np.concatenate([np.diff(part.vision_offsets) for part in parts])
        return cls(**values, offsets=offsets_of(counts), vision_offsets=offsets_of(of_pieces))

    def between(self, first: int, end: int) -> "Sequences":
        """The sequences from `first` to `end`, without a copy."""
        begin, stop = int(self.offsets[first]), int(self.offsets[end])
        grids = slice(int(self.vision_offsets[begin]), int(self.vision_offsets[stop]))
        return Sequences(
            self.items[begin:stop],
            self.starts[begin:stop],
            self.lengths[begin:stop],
            self.offsets[first : end + 1] - begin,
            self.vision_offsets[begin : stop + 1] - grids.start,
            self.grids[grids],
            self.epochs[begin:stop],
        )

    def chosen(self, numbers: np.ndarray) -> "Sequences":
        """The sequences of the given numbers [k], in that order."""
        counts = self.offsets[numbers + 1] - self.offsets[numbers]
        pieces = positions_of(self.offsets[numbers], counts)
        of_pieces = self.vision_offsets[pieces + 1] - self.vision_offsets[pieces]
        grids = self.grids[positions_of(self.vision_offsets[pieces], of_pieces)]
        return Sequences(
            self.items[pieces],
            self.starts[pieces],
            self.lengths[pieces],
            offsets_of(counts),
            offsets_of(of_pieces),
            grids,
            self.epochs[pieces],
        )
