"""The words that facts are about: some of those of a vocabulary that are one token each."""

import hashlib
import re
from dataclasses import dataclass

from k25_train.data.tokenizer import Tokenizer
from k25_train.errors import DataError

_WORD = re.compile(r" [a-z]{3,}")
NUM_TRAIN, NUM_HELDOUT = 192, 64
"""Words of each kind. Our choice: enough that copying one from the context is worth learning at once, and few
enough that each is seen often."""


@dataclass(frozen=True, slots=True)
class Words:
    """Words, each with the space before it."""

    train: tuple[str, ...]
    """Keys and values of the facts that are trained on."""
    heldout_keys: tuple[str, ...]
    """Keys of the needles that are searched for: no fact that is trained on has one of them."""
    heldout_values: tuple[str, ...]
    """Their values, likewise."""

    @property
    def every(self) -> tuple[str, ...]:
        """All of them, which lists are made of."""
        return self.train + self.heldout_keys + self.heldout_values


def words_of(tokenizer: Tokenizer) -> Words:
    """The words of a vocabulary, in an order that depends on their spelling alone.

    Raises DataError for a vocabulary with too few words of one token.
    """
    spelled = [tokenizer.decode([token]) for token in range(tokenizer.vocab_size)]
    found = sorted({word for word in spelled if _WORD.fullmatch(word)}, key=_order)
    lengths = [len(ids) for ids in tokenizer.encode_batch(found)]
    alone = [word for word, length in zip(found, lengths, strict=True) if length == 1]
    if len(alone) < NUM_TRAIN + NUM_HELDOUT:
        raise DataError(
            f"the vocabulary has {len(alone)} words that are one token each, needles need "
            f"{NUM_TRAIN + NUM_HELDOUT}. Use a tokenizer with a larger vocabulary."
        )
    middle = NUM_TRAIN + NUM_HELDOUT // 2
    return Words(
        tuple(alone[:NUM_TRAIN]),
        tuple(alone[NUM_TRAIN:middle]),
        tuple(alone[middle : NUM_TRAIN + NUM_HELDOUT]),
    )


def _order(word: str) -> bytes:
    return hashlib.sha256(f"needle{word}".encode()).digest()
