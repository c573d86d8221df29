"""Which tokens of a micro-batch each of the ranks that share it holds. Pure, and the same on every rank.

Each rank holds as many tokens as the others, so that everything but attention takes equally long. Attention's
work is by pairs of a token and an earlier one of its document: a long document is cut into twice as many
pieces as there are ranks, and a rank gets one from its beginning with the one as far from its end. A short
document stays whole, since small pieces keep kernels from being efficient, and goes to the rank with the
least work. What is padding costs no attention, and fills up. Source: not disclosed, our choice; to cut each
document instead of the sequence is per-document sharding of WLB-LLM (arXiv 2503.17924).

    documents   |-------- a --------|-- b --|- c -|pad|        2 ranks
    rank 0      a0          a3        b                       a = a0 a1 a2 a3
    rank 1         a1    a2                   c     pad
"""

import functools
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from itertools import accumulate
from typing import NamedTuple

import numpy as np

CACHED_PLANS = 256
"""Plans that a process keeps: of 32 ranks and some long documents, one takes hundreds of KB."""
MIN_PIECE_TOKENS = 128
"""Tokens of the smallest piece that a document is cut into for balance: a block of attention's kernels. Our
choice."""


class Piece(NamedTuple):
    """Consecutive tokens of a document."""

    document: int
    """Position among the documents of the micro-batch, padding included."""
    start: int
    """First token, counted from the document's first."""
    stop: int
    """Token after the last."""

    @property
    def num_tokens(self) -> int:
        """Tokens of the piece."""
        return self.stop - self.start

    @property
    def num_pairs(self) -> int:
        """Pairs of one of its tokens and one of the document up to it: what attention computes."""
        return (self.stop * (self.stop + 1) - self.start * (self.start + 1)) // 2


@dataclass(frozen=True, slots=True)
class ContextPlan:
    """The pieces of a micro-batch of T tokens, on `cp` ranks of T / cp tokens each."""

    document_lengths: tuple[int, ...]
    """Tokens of each document, padding included; they sum to T."""
    padding: frozenset[int]
    """Positions in `document_lengths` of what is padding."""
    pieces: tuple[tuple[Piece, ...], ...]
    """[rank among those that share the micro-batch] -> its pieces in the order in which it holds them: by
    document, then by token."""

    @property
    def num_ranks(self) -> int:
        """Ranks that share the micro-batch."""
        return len(self.pieces)

    @property
    def num_tokens(self) -> int:
        """Tokens that each rank holds."""
        return sum(self.document_lengths) // len(self.pieces)

    def positions(self, rank: int) -> np.ndarray:
        """Where the rank's tokens are in the micro-batch, [T / cp] int64, ascending."""
        before = [0, *accumulate(self.document_lengths)]
        spans = [
            np.arange(before[each.document] + each.start, before[each.document] + each.stop)
            for each in self.pieces[rank]
        ]
        return np.concatenate(spans) if spans else np.zeros(0, dtype=np.int64)

    def tokens_of_sequences(self, rank: int, sequence_tokens: int) -> tuple[int, ...]:
        """How many tokens the rank holds of each of the sequences, of `sequence_tokens` each, that make up
        the micro-batch. In the order in which it holds them, those of a sequence follow one another."""
        sequences = self.positions(rank) // sequence_tokens
        num_sequences = sum(self.document_lengths) // sequence_tokens
        return tuple(np.bincount(sequences, minlength=num_sequences).tolist())

    def num_pairs(self, rank: int) -> int:
        """Pairs of tokens that the rank's attention computes; padding has none."""
        return sum(each.num_pairs for each in self.pieces[rank] if each.document not in self.padding)


def plan_context(document_lengths: Sequence[int], padding: Collection[int], num_ranks: int) -> ContextPlan:
    """Share the documents of a micro-batch among `num_ranks`.

    Raises ValueError if their tokens are no multiple of the ranks.
    """
    return _plan(tuple(document_lengths), frozenset(padding), num_ranks)


@functools.lru_cache(maxsize=CACHED_PLANS)
def _plan(lengths: tuple[int, ...], padding: frozenset[int], num_ranks: int) -> ContextPlan:
    share, rest = divmod(sum(lengths), num_ranks)
    if rest:
        raise ValueError(f"{sum(lengths)} tokens cannot be shared evenly by {num_ranks} ranks")
    shares = _Shares(num_ranks, share)
    long = [each for each, length in enumerate(lengths) if length >= 2 * num_ranks * MIN_PIECE_TOKENS]
    whole = [each for each in range(len(lengths)) if each not in {*long, *padding}]
    # 1. Long documents in pieces, from both ends; then whole ones, the longest first; padding fills up.
    for document in long:
        if document not in padding:
            shares.cut(document, lengths[document])
    for document in sorted(whole, key=lambda each: -lengths[each]):
        shares.place(document, lengths[document])
    for document in sorted(padding):
        shares.fill(Piece(document, 0, lengths[document]))
    return ContextPlan(lengths, padding, tuple(tuple(_joined(each)) for each in shares.pieces))


class _Shares:
    """The ranks' shares in the making."""

    def __init__(self, num_ranks: int, num_tokens: int) -> None:
        self.pieces: list[list[Piece]] = [[] for _ in range(num_ranks)]
        self.room = [num_tokens] * num_ranks
        self.pairs = [0] * num_ranks

    def cut(self, document: int, length: int) -> None:
        """Pieces from both ends of a long document for each rank; what has no room goes wherever there is."""
        num_ranks = len(self.pieces)
        borders = [length * each // (2 * num_ranks) for each in range(2 * num_ranks + 1)]
        for number in range(2 * num_ranks):
            rank = min(number, 2 * num_ranks - 1 - number)
            piece = Piece(document, borders[number], borders[number + 1])
            taken = min(piece.num_tokens, self.room[rank])
            self._take(rank, piece._replace(stop=piece.start + taken))
            self.fill(piece._replace(start=piece.start + taken))

    def place(self, document: int, length: int) -> None:
        """A document on the rank with the least work among those with room for it; in pieces if none has."""
        fitting = [rank for rank, room in enumerate(self.room) if room >= length]
        if fitting:
            self._take(min(fitting, key=lambda rank: (self.pairs[rank], rank)), Piece(document, 0, length))
        else:
            self.fill(Piece(document, 0, length))

    def fill(self, piece: Piece) -> None:
        """A piece wherever there is room, most room first."""
        while piece.num_tokens:
            rank = max(range(len(self.room)), key=lambda each: (self.room[each], -each))
            taken = min(piece.num_tokens, self.room[rank])
            self._take(rank, piece._replace(stop=piece.start + taken))
            piece = piece._replace(start=piece.start + taken)

    def _take(self, rank: int, piece: Piece) -> None:
        if not piece.num_tokens:
            return
        self.pieces[rank].append(piece)
        self.room[rank] -= piece.num_tokens
        self.pairs[rank] += piece.num_pairs


def _joined(pieces: Sequence[Piece]) -> list[Piece]:
    """The pieces in order, neighbours as one."""
    found: list[Piece] = []
    for piece in sorted(pieces):
        if found and found[-1].document == piece.document and found[-1].stop == piece.start:
            found[-1] = found[-1]._replace(stop=piece.stop)
        else:
            found.append(piece)
    return found
