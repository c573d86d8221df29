"""The words that facts are about: some of those of a vocabulary that are one token each."""

import hashlib
import re
from dataclasses import dataclass

from k25_train.data.tokenizer import Tokenizer
from k25_train.errors import DataError

_WORD = re.compile(r" [a-z]{3,}")
NUM_WORDS, NUM_OF_FACTS = 256, 192
"""Words of lists, and of these the keys and values of facts. Our choice: enough that copying one from the
context is worth learning at once, few enough that each is seen often, and facts are about the rarer ones,
which real text seldom has."""
HELDOUT_SHARE = 0.2
"""Of the pairs of a key and a value. Our choice."""


@dataclass(frozen=True, slots=True)
class Words:
    """Words, each with the space before it."""

    every: tuple[str, ...]
    """All of them, which lists are made of."""
    of_facts: tuple[str, ...]
    """Keys and values."""


def words_of(tokenizer: Tokenizer) -> Words:
    """The words of a vocabulary, in an order that depends on their spelling alone.

    Raises DataError for a vocabulary with too few words of one token.
    """
    spelled = [tokenizer.decode([token]) for token in range(tokenizer.vocab_size)]
    found = sorted({word for word in spelled if _WORD.fullmatch(word)}, key=_order)
    ids = dict(zip(found, tokenizer.encode_batch(found), strict=True))
    every = [word for word in found if len(ids[word]) == 1][:NUM_WORDS]
    if len(every) < NUM_WORDS:
        raise DataError(
            f"the vocabulary has {len(every)} words that are one token each, needles need {NUM_WORDS}. Use a "
            "tokenizer with a larger vocabulary."
        )
    # Tokens are numbered by when they were merged, the most frequent first.
    rare = sorted(every, key=lambda word: ids[word][0])[-NUM_OF_FACTS:]
    return Words(tuple(every), tuple(sorted(rare, key=_order)))


def is_heldout(key: str, value: str) -> bool:
    """Whether no document that is trained on has this fact; by the spelling of both alone."""
    digest = hashlib.sha256(f"needle{key}{value}".encode()).digest()
    return int.from_bytes(digest[:8]) < HELDOUT_SHARE * 2**64


def _order(word: str) -> bytes:
    return hashlib.sha256(f"needle{word}".encode()).digest()
