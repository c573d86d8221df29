"""Packs the documents of a window into sequences of `seq_len` tokens. Pure: arrays of lengths in, pieces out.

Text is cut: documents are laid end to end and the line is cut every `seq_len` tokens. Chats and samples with
media stay whole, each in a sequence with enough room, so that little of it is left.

Invariants, for every window:
- pieces of a document are consecutive, in order, and cover it exactly once;
- the pieces of a sequence sum to at most `seq_len`; cut sequences are full, except the last;
- uncut documents are one piece each; those longer than `seq_len`, and empty ones, have none;
- the result depends on the arguments alone.

How K2.5 packs is not disclosed; this is our choice.
"""

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from k25_train.data.mix.permutation import hashed
from k25_train.data.mix.ragged import offsets_of, positions_of, sums_of

FEW_SEQUENCES = 32
"""Down to here a round fills nine tenths of the sequences that the documents need: all of them then find a
document that fits, and what is left over is packed again."""
type Wanted = Callable[[np.ndarray, np.ndarray, int], np.ndarray]
"""(room of each row, lengths of the documents left in ascending order, turn) -> most that each row wants."""


@dataclass(frozen=True, slots=True, eq=False)
class Packed:
    """The sequences of a window: P pieces of documents in S sequences."""

    documents: np.ndarray
    """[P] int64: positions in the lengths that were packed."""
    starts: np.ndarray
    """[P] int64: first token of each piece in its document."""
    lengths: np.ndarray
    """[P] int64: its tokens."""
    offsets: np.ndarray
    """[S + 1] int64: where the pieces of each sequence begin; what they leave of `seq_len` is padding."""

    @property
    def num_sequences(self) -> int:
        """S."""
        return len(self.offsets) - 1

    def num_tokens(self) -> np.ndarray:
        """[S] int64: tokens of each sequence without padding."""
        return sums_of(self.lengths, self.offsets)

    def in_order(self, order: np.ndarray) -> "Packed":
        """The same sequences in the given order [S]."""
        counts = np.diff(self.offsets)[order]
        pieces = positions_of(self.offsets[:-1][order], counts)
        return Packed(self.documents[pieces], self.starts[pieces], self.lengths[pieces], offsets_of(counts))


def pack_cut(lengths: np.ndarray, seq_len: int) -> Packed:
    """Pack documents of `lengths` [n] tokens in their order, cutting them where a sequence is full."""
    # 1. Documents end to end, and the sequences that each of them lies in.
    ends = np.cumsum(lengths, dtype=np.int64)
    begins = ends - lengths
    first_sequences = begins // seq_len
    counts = np.where(lengths > 0, (ends - 1) // seq_len - first_sequences + 1, 0)

    # 2. A piece for each of them, from where both have begun to where one of them ends.
    documents = np.repeat(np.arange(len(lengths)), counts)
    sequences = positions_of(first_sequences, counts)
    starts = np.maximum(begins[documents], sequences * seq_len)
    stops = np.minimum(ends[documents], (sequences + 1) * seq_len)
    offsets = offsets_of(np.bincount(sequences))
    return Packed(documents, starts - begins[documents], stops - starts, offsets)


def pack_whole(lengths: np.ndarray, seq_len: int, key: int) -> Packed:
    """Pack documents of `lengths` [n] tokens without cutting one; `key` decides which ones meet.

    Two rules are tried, and the one that needs fewer sequences is kept: long documents pack best when every
    sequence takes the longest that fits, documents of which several make a sequence when only its last one is
    chosen so. Takes 0.5 µs per document in windows of 16,384.
    """
    rows = min(
        (_rows_of(lengths, seq_len, _longest_that_fits), _rows_of(lengths, seq_len, _leaves_room(key))),
        key=lambda rows: int(rows.max(initial=-1)),
    )
    placed = np.flatnonzero(rows >= 0)
    documents = placed[np.argsort(rows[placed], kind="stable")]
    counts = np.bincount(rows[placed])
    packed = Packed(
        documents, np.zeros_like(documents), lengths[documents].astype(np.int64), offsets_of(counts)
    )
    # In the order of their first documents, whatever the rows were opened for.
    return packed.in_order(np.argsort(documents[packed.offsets[:-1]], kind="stable"))


def _rows_of(lengths: np.ndarray, seq_len: int, wanted: Wanted) -> np.ndarray:
    """[n] int64: the sequence of each document, counted from 0; -1 for those that have none."""
    rows = np.full(len(lengths), -1, dtype=np.int64)
    order = np.argsort(lengths, kind="stable")
    left = order[(lengths[order] > 0) & (lengths[order] <= seq_len)]
    num_rows = 0
    while len(left):
        # 1. As many rows as the documents need, each opened with one of the longest.
        of_left = lengths[left]
        needed = int(of_left.sum()) // seq_len
        if needed > FEW_SEQUENCES and wanted is not _longest_that_fits:
            needed = needed * 9 // 10
        opened = min(max(needed, int(np.count_nonzero(2 * of_left > seq_len)), 1), len(left))
        numbers = np.arange(num_rows, num_rows + opened)
        rows[left[-opened:]] = numbers
        num_rows += opened

        # 2. Turn by turn, each of them takes a document.
        left = _fill(rows, lengths, left[:-opened], numbers, seq_len - of_left[-opened:], wanted)
    return rows


def _fill(
    rows: np.ndarray,
    lengths: np.ndarray,
    left: np.ndarray,
    numbers: np.ndarray,
    room: np.ndarray,
    wanted: Wanted,
) -> np.ndarray:
    """Fill rows of the given `numbers` and `room` with the documents `left`, in ascending order of length;
    what fits nowhere comes back."""
    turn = 0
    is_last_try = np.zeros(len(room), dtype=np.bool_)
    while len(left):
        # 1. Rows that have room for the shortest.
        of_left = lengths[left]
        open_rows = np.flatnonzero(room >= of_left[0])
        numbers, room, is_last_try = numbers[open_rows], room[open_rows], is_last_try[open_rows]
        if not len(room):
            break
        most = np.where(is_last_try, room, wanted(room, of_left, turn))

        # 2. From the row that wants the longest on, each takes the longest of those that are left to it.
        order = np.argsort(-most, kind="stable")
        turns = np.arange(len(order))
        fitting = np.searchsorted(of_left, most[order], side="right") - 1
        taken = np.minimum.accumulate(fitting + turns) - turns
        num_taken = int(np.count_nonzero(taken >= 0))
        taken, takers, others = taken[:num_taken], order[:num_taken], order[num_taken:]
        rows[left[taken]] = numbers[takers]
        room[takers] -= of_left[taken]

        # 3. A row that came too late may want more, up to its room; once that was not enough, it is closed.
        room[others[most[others] == room[others]]] = 0
        is_last_try[others] = True
        left = np.delete(left, taken)
        turn += 1
    return left


def _longest_that_fits(room: np.ndarray, lengths: np.ndarray, turn: int) -> np.ndarray:
    return room


def _leaves_room(key: int) -> Wanted:
    """Any document while two more fit; then one that leaves room for another, last the longest that fits."""

    def wanted(room: np.ndarray, lengths: np.ndarray, turn: int) -> np.ndarray:
        shortest, longest = lengths[0], lengths[-1]
        draws = hashed(np.arange(len(room)) + (turn << 32), key) % np.uint64(len(lengths))
        drawn = lengths[draws.astype(np.int64)]
        most = np.where(room - drawn >= longest + shortest, drawn, room - drawn)
        return np.where((room < 2 * shortest) | (most < shortest), room, most)

    return wanted
