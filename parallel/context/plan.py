"""Which tokens of a micro-batch each of the ranks that share it holds. Pure, and the same on every rank.

How documents are cut and who gets which piece is in `shares.py`.
"""

import functools
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from itertools import accumulate

import numpy as np

from parallel.context.piece import Piece
from parallel.context.shares import share_documents

CACHED_PLANS = 256
"""Plans that a process keeps: of 32 ranks and some long documents, one takes hundreds of KB."""


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
    return ContextPlan(lengths, padding, share_documents(lengths, padding, num_ranks))
