"""The words that facts are about: some of those of a vocabulary that are one token each."""

import hashlib
import re
from dataclasses import dataclass

from k25_train.data.tokenizer import Tokenizer
from k25_train.errors import DataError

_WORD = re.compile(r" [a-z]{3,}")
NUM_WORDS, NUM_TRAIN, NUM_HELDOUT = 256, 144, 48
"""Words of lists, and of these the keys and values of facts that are trained on, and of needles. Our choice:
enough that copying one from the context is worth learning at once, few enough that each is seen often, and
facts are about the rarer ones, which real text seldom has besides."""


@dataclass(frozen=True, slots=True)
class Words:
    """Words, each with the space before it."""

    every: tuple[str, ...]
    """All of them, which lists are made of."""
    train: tuple[str, ...]
    """Keys and values of the facts that are trained on."""
    heldout_keys: tuple[str, ...]
    """Keys of the needles that are searched for: no fact that is trained on has one of them."""
    heldout_values: tuple[str, ...]
    """Their values, likewise."""


def words_of(tokenizer: Tokenizer) -> Words:
    """The words of a vocabulary, in an order that depends on their spelling alone.

    Raises DataError for a vocabulary with too few words of one token.
    """
    spelled = [tokenizer.decode([token]) for token in range(tokenizer.vocab_size)]
    found = sorted({word for word in spelled if _WORD.fullmatch(word)}, key=_order)
    lengths = [len(ids) for ids in tokenizer.encode_batch(found)]
    alone = [word for word, length in zip(found, lengths, strict=True) if length == 1]
    if len(alone) < NUM_WORDS:
        raise DataError(
            f"the vocabulary has {len(alone)} words that are one token each, needles need {NUM_WORDS}. Use a "
            "tokenizer with a larger vocabulary."
        )
    every = alone[:NUM_WORDS]
    # Tokens are numbered by when they were merged, the most frequent first.
    number = {word: ids[0] for word, ids in zip(every, tokenizer.encode_batch(every), strict=True)}
    rare = sorted(every, key=number.__getitem__)[-(NUM_TRAIN + NUM_HELDOUT) :]
    rare.sort(key=_order)
    middle = NUM_TRAIN + NUM_HELDOUT // 2
    return Words(tuple(every), tuple(rare[:NUM_TRAIN]), tuple(rare[NUM_TRAIN:middle]), tuple(rare[middle:]))


def _order(word: str) -> bytes:
    return hashlib.sha256(f"needle{word}".encode()).digest()
