"""Pieces of documents, of which a rank's share of a micro-batch consists, and what they cost."""

from typing import NamedTuple

PAIRS_PER_KEY = 410
"""Pairs of a query and a key that cost as much as to make a key and its value from a latent. Source: products
per head of Kimi K2.5, 512 x (128 + 128) against 192 + 128."""


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

    @property
    def work(self) -> int:
        """What the piece costs in attention, in pairs: its own, and keys and values of all tokens before its
        end."""
        return self.num_pairs + PAIRS_PER_KEY * self.stop
