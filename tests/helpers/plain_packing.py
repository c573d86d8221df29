"""Packs documents of one kind into sequences of `seq_len` tokens. Pure: lengths in, pieces out.

Text is cut: shuffled documents are laid end to end and the line is cut every `seq_len` tokens. Samples with
media stay whole: rows are filled best-fit from a look-ahead window over the shuffled order.

Invariants, for every epoch:
- pieces of a document are consecutive, in order, and cover it exactly once; skipped documents have none;
- the pieces of a sequence sum to at most `seq_len`; cut sequences are full, except the last of the epoch;
- uncut documents are one piece each, and exactly those longer than `seq_len` are skipped;
- the oldest document of the window is always taken next when a row is opened, so none is postponed for long;
- the result depends on the arguments alone.

Packing and its window are not disclosed for K2.5; both are our choice.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import islice

import numpy as np

LOOK_AHEAD = 64
"""Documents among which the best-fitting one is chosen. Larger wastes less padding and shuffles less well."""


@dataclass(frozen=True, slots=True)
class Piece:
    """Tokens `start` to `start + length` of a document."""

    document: int
    """Position of the document in the lengths that were packed."""
    start: int
    """First token of the piece in its document."""
    length: int
    """Tokens of the piece."""


@dataclass(frozen=True, slots=True, kw_only=True)
class PackedEpoch:
    """All sequences of one pass over the documents."""

    sequences: tuple[tuple[Piece, ...], ...]
    """[sequence] -> its pieces, from its first token on; what they leave of `seq_len` is padding."""
    skipped: tuple[int, ...]
    """Documents longer than `seq_len`, in ascending order."""


def epoch_order(num_documents: int, seed: int, epoch: int, stream: int, shuffle: bool) -> list[int]:
    """Order of the documents in an epoch: a permutation fixed by (seed, epoch, stream), or file order.

    `stream` is another one for each kind, so that equal seeds do not shuffle them alike.
    """
    if not shuffle:
        return list(range(num_documents))
    generator = np.random.Generator(np.random.PCG64([seed, epoch, stream]))
    return [int(i) for i in generator.permutation(num_documents)]


def pack_cut(lengths: Sequence[int], order: Sequence[int], seq_len: int) -> PackedEpoch:
    """Pack documents of `lengths` tokens, taken in `order`, cutting them where a sequence is full."""
    sequences: list[tuple[Piece, ...]] = []
    row: list[Piece] = []
    room = seq_len
    for document in order:
        start = 0
        # The document fills the row, and as many more as it needs; the next one begins where it ends.
        while start < lengths[document]:
            length = min(room, lengths[document] - start)
            row.append(Piece(document, start, length))
            start += length
            room -= length
            if room == 0:
                sequences.append(tuple(row))
                row, room = [], seq_len
    if row:
        sequences.append(tuple(row))
    return PackedEpoch(sequences=tuple(sequences), skipped=())


def pack_whole(lengths: Sequence[int], order: Sequence[int], seq_len: int) -> PackedEpoch:
    """Pack documents of `lengths` tokens, taken in `order`, never cutting one; too long ones are skipped."""
    # 1. Documents that fit into a sequence, in shuffled order; the window looks ahead in it.
    skipped = tuple(document for document in sorted(order) if lengths[document] > seq_len)
    waiting = iter([document for document in order if 0 < lengths[document] <= seq_len])
    window = list(islice(waiting, LOOK_AHEAD))

    # 2. A row opens with the oldest document of the window and takes the longest that fits, until none does.
    sequences: list[tuple[Piece, ...]] = []
    while window:
        row: list[Piece] = []
        room = seq_len
        best: int | None = 0
        while best is not None:
            document = window.pop(best)
            row.append(Piece(document, 0, lengths[document]))
            room -= lengths[document]
            window += islice(waiting, 1)
            best = _best_fit([lengths[document] for document in window], room)
        sequences.append(tuple(row))
    return PackedEpoch(sequences=tuple(sequences), skipped=skipped)


def _best_fit(lengths: Sequence[int], room: int) -> int | None:
    """Position of the longest that fits, the earliest of equals; None if none does."""
    fitting = [i for i, length in enumerate(lengths) if length <= room]
    return max(fitting, key=lambda i: (lengths[i], -i)) if fitting else None
