"""The words that facts are about: those of a vocabulary that are one token each."""

import hashlib
import re
from collections.abc import Sequence
from dataclasses import dataclass

from k25_train.data.tokenizer import Tokenizer
from k25_train.errors import DataError

_WORD = re.compile(r" [a-z]{3,}")
HELDOUT_SHARE = 0.2
"""Of the words. Our choice."""
MIN_WORDS = 64
"""Of each split: a document's keys and values differ. Our choice."""


@dataclass(frozen=True, slots=True)
class Words:
    """Words of each split, each with the space before it; none is in both."""

    train: tuple[str, ...]
    """For documents that are trained on."""
    heldout: tuple[str, ...]
    """For needles that are searched for: no training document has them as a key or a value."""

    def of(self, split: str) -> Sequence[str]:
        """Those of `train` or `heldout`."""
        return self.train if split == "train" else self.heldout


def words_of(tokenizer: Tokenizer) -> Words:
    """The words of a vocabulary, in the order of their ids.

    Raises DataError for a vocabulary with too few words of one token.
    """
    found = [word for each in range(tokenizer.vocab_size) if _WORD.fullmatch(word := tokenizer.decode([each]))]
    alone = [
        word for word, ids in zip(found, tokenizer.encode_batch(found), strict=True) if len(ids) == 1
    ]
    heldout = {word for word in alone if _share(word) < HELDOUT_SHARE}
    words = Words(tuple(word for word in alone if word not in heldout), tuple(w for w in alone if w in heldout))
    if min(len(words.train), len(words.heldout)) < MIN_WORDS:
        raise DataError(
            f"the vocabulary has {len(alone)} words that are one token each, {len(heldout)} of them held out; "
            f"needles need {MIN_WORDS} of each split. Use a tokenizer with a larger vocabulary."
        )
    return words


def _share(word: str) -> float:
    return int.from_bytes(hashlib.sha256(f"needle {word}".encode()).digest()[:8]) / 2**64
