"""Documents to learn retrieval from: real text, facts among its lines, and questions at the end.

    … text …\nName: garden window.\n… text …\nName: water stone.\n… text …\nName: water stone.\nName: garden window.

A fact is a pair of words, key and value, each a token of its own; a question repeats a fact up to its value,
and only values behind questions have a loss. A recital is a passage or a list of words, and the same again,
with a loss on the second time.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from k25_train.data.formats.shard_writer import TextPart
from k25_train.data.tokenizer import Tokenizer

MARK = "\nName:"
"""What a fact, and a question, begins with."""
END = ".\n"


@dataclass(frozen=True, slots=True)
class Passages:
    """Real text as token ids, from which stretches are taken."""

    ids: tuple[np.ndarray, ...]
    """Ids of each text."""
    tokenizer: Tokenizer
    """Whose ids they are."""

    @classmethod
    def of(cls, texts: Sequence[str], tokenizer: Tokenizer) -> "Passages":
        """The texts' tokens."""
        return cls(tuple(np.array(ids) for ids in tokenizer.encode_batch(texts) if ids), tokenizer)

    def stretches(self, lengths: Sequence[int], random: np.random.Generator) -> list[str]:
        """Texts of about these lengths in tokens, which follow one another in a real text (or in several,
        where one is too short)."""
        total = sum(lengths)
        found: list[np.ndarray] = []
        while sum(map(len, found)) < total:
            ids = self.ids[random.integers(len(self.ids))]
            start = random.integers(max(len(ids) - total, 0) + 1)
            found.append(ids[start : start + total])
        pieces = np.split(np.concatenate(found)[:total], np.cumsum(lengths)[:-1])
        # A character that a cut goes through is left out.
        return [self.tokenizer.decode(piece.tolist()).replace("\ufffd", "") for piece in pieces]


def fact_document(
    passages: Passages,
    words: Sequence[str],
    random: np.random.Generator,
    *,
    num_tokens: int,
    num_facts: int,
    num_questions: int,
    spread: float = 1.0,
    asked: Sequence[int] | None = None,
    depths: Sequence[float] | None = None,
    trains_on_text: bool = False,
) -> list[tuple[str, bool]]:
    """Parts of a document: text, and whether it has a loss."""
    chosen = random.choice(len(words), 2 * num_facts, replace=False)
    pairs = [(words[k], words[v]) for k, v in chosen.reshape(-1, 2)]
    if depths is None:
        depths = sorted(random.random(num_facts))
    fact_tokens = len(passages.tokenizer.encode(MARK)) + 2 + len(passages.tokenizer.encode(END))
    text_tokens = max(num_tokens - fact_tokens * (num_facts + num_questions) - 4, num_facts + 1)
    ends = [round(text_tokens * depth) for depth in depths]
    lengths = np.diff([0, *ends, text_tokens])
    texts = passages.stretches(lengths.tolist(), random)
    parts: list[tuple[str, bool]] = []
    for text, (key, value) in zip(texts, pairs, strict=False):
        parts += [(text, trains_on_text), (f"{MARK}{key}{value}{END}", False)]
    parts.append((texts[-1], trains_on_text))
    order = asked if asked is not None else random.permutation(num_facts)[:num_questions]
    for number in order:
        key, value = pairs[number]
        parts += [(f"{MARK}{key}", False), (value, True), (END, False)]
    return [part for part in parts if part[0]]


def list_document(words: Sequence[str], random: np.random.Generator, num_words: int) -> list[tuple[str, bool]]:
    """A list of words, and the same again."""
    chosen = "".join(words[n] for n in random.choice(len(words), num_words, replace=num_words > len(words)))
    return [(f"List:{chosen}{END}", False), (f"List:{chosen}{END}", True)]


def recital_document(passages: Passages, random: np.random.Generator, num_tokens: int) -> list[tuple[str, bool]]:
    """A passage, and the same again."""
    (text,) = passages.stretches([num_tokens], random)
    return [(f"{text}\n", False), (text, True)]


def text_parts(parts: Sequence[tuple[str, bool]], tokenizer: Tokenizer) -> list[TextPart]:
    """The same with their numbers of tokens."""
    counts = [len(ids) for ids in tokenizer.encode_batch([text for text, _ in parts])]
    return [
        TextPart(text=text, num_tokens=count, loss=loss)
        for (text, loss), count in zip(parts, counts, strict=True)
    ]
