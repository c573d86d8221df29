"""Documents to learn retrieval from, and to search for needles in.

    … text …
    Name: garden window.         a fact: key and value, words of one token each
    … text …
    Name: water stone.
    … text …
    Name: water stone.           questions: a fact once more, of which the value alone has a loss
    Name: garden window.

A list is some words, and the same words again, with a loss on the second time. Short ones come first: with
few words to choose from, looking back is worth something before the right one is found (`k25_train/recipes`).
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from k25_train.data.formats.shard_writer import TextPart
from k25_train.data.needles.words import is_heldout
from k25_train.data.tokenizer import Tokenizer

MARK, END = "\nName:", ".\n"
"""What a fact, and a question, begins and ends with."""

Part = tuple[str, bool]
"""Text, and whether it has a loss."""
Fact = tuple[str, str]
"""Key and value."""


@dataclass(frozen=True, slots=True)
class Passages:
    """Real text, of which stretches are taken."""

    ids: tuple[np.ndarray, ...]
    """Token ids of each text."""
    tokenizer: Tokenizer
    """Whose ids they are."""

    @classmethod
    def of(cls, texts: Sequence[str], tokenizer: Tokenizer) -> "Passages":
        """Those of the texts."""
        return cls(tuple(np.array(ids) for ids in tokenizer.encode_batch(texts) if ids), tokenizer)

    def stretches(self, lengths: Sequence[int], random: np.random.Generator) -> list[str]:
        """Texts of about these lengths in tokens, which follow one another in a real text, or in several
        where one is too short."""
        total = sum(lengths)
        found: list[np.ndarray] = []
        while sum(map(len, found)) < total:
            ids = self.ids[random.integers(len(self.ids))]
            start = random.integers(max(len(ids) - total, 0) + 1)
            found.append(ids[start : start + total])
        joined = np.concatenate([*found, np.zeros(0, dtype=np.int64)])[:total]
        pieces = np.split(joined, np.cumsum(lengths)[:-1])
        # A character that a cut goes through is left out.
        return [self.tokenizer.decode(piece.tolist()).replace("\ufffd", "") for piece in pieces]


def fact_document(
    passages: Passages,
    facts: Sequence[Fact],
    depths: Sequence[float],
    asked: Sequence[int],
    num_tokens: int,
    random: np.random.Generator,
) -> list[Part]:
    """A document of about `num_tokens` tokens.

    Args:
        facts: in the order in which they are told.
        depths: where in the text each is told, from 0 to 1, ascending.
        asked: numbers of the facts that are asked for, in order.
    """
    per_fact = len(passages.tokenizer.encode(f"{MARK}{END}")) + 2
    num_text = max(num_tokens - per_fact * (len(facts) + len(asked)), 0)
    ends = [round(num_text * depth) for depth in depths]
    texts = passages.stretches(np.diff([0, *ends, num_text]).tolist(), random)
    told = [f"{text}{MARK}{key}{value}{END}" for text, (key, value) in zip(texts, facts, strict=False)]
    before = "".join([*told, texts[-1]])
    parts: list[Part] = []
    for number in asked:
        key, value = facts[number]
        parts += [(f"{before}{MARK}{key}", False), (value, True)]
        before = END
    return [*parts, (END, False)]


def random_facts(words: Sequence[str], count: int, random: np.random.Generator) -> list[Fact]:
    """At most so many facts of different words, none of which is held out."""
    chosen = random.choice(len(words), 2 * count, replace=False).reshape(-1, 2)
    facts = [(words[key], words[value]) for key, value in chosen.tolist()]
    return [fact for fact in facts if not is_heldout(*fact)]


def list_document(words: Sequence[str], count: int, random: np.random.Generator) -> list[Part]:
    """A list of different words, and the same again."""
    chosen = "".join(words[number] for number in random.choice(len(words), count, replace=False).tolist())
    return [(f"{chosen}{END}", False), (chosen, True)]


def text_parts(parts: Sequence[Part], tokenizer: Tokenizer) -> list[TextPart]:
    """The same with their numbers of tokens, as shards have them."""
    counts = [len(ids) for ids in tokenizer.encode_batch([text for text, _ in parts])]
    return [
        TextPart(text=text, num_tokens=count, loss=loss)
        for (text, loss), count in zip(parts, counts, strict=True)
    ]
