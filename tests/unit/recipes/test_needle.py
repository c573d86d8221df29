"""Needles: what documents hold, and how what a model says is scored."""

import json

import numpy as np
import pytest
import torch

from k25_train.data.needles.build import NUM_DEPTHS
from k25_train.data.needles.documents import Passages, fact_document, list_document, random_facts, text_parts
from k25_train.data.needles.words import HELDOUT_SHARE, NUM_OF_FACTS, NUM_WORDS, is_heldout, words_of
from k25_train.data.tokenizer import Tokenizer
from k25_train.errors import DataError
from k25_train.recipes.needle import NeedleScore, by_depth, lines_of, settings
from k25_train.training.needles import scores


class Letters(Tokenizer):
    """A vocabulary in which every whole word of its list is a token, and so is every other character."""

    def __init__(self, words: list[str]) -> None:
        names = "[BOS] [EOS] [PAD] <|media_begin|> <|media_content|> <|media_end|> <|media_pad|>".split()
        super().__init__(b"", {name: number for number, name in enumerate(names)})
        self.pieces = [*names, *words, *map(chr, range(32, 127)), "\n"]
        self.ids = {piece: number for number, piece in enumerate(self.pieces)}

    @property
    def vocab_size(self) -> int:
        return len(self.pieces)

    def encode_batch(self, texts: object) -> list[list[int]]:
        found = []
        for text in texts:  # type: ignore[attr-defined]
            ids = []
            while text:
                word = next((w for w in self.pieces[7:-96] if text.startswith(w)), text[0])
                ids.append(self.ids[word])
                text = text[len(word) :]
            found.append(ids)
        return found

    def decode(self, ids: object) -> str:
        return "".join(self.pieces[each] for each in ids)  # type: ignore[attr-defined]

    def parts(self, text: str) -> list[str]:
        return [text]


def letters(count: int = NUM_WORDS) -> Letters:
    """A vocabulary with so many words."""
    return Letters([f" w{chr(97 + n // 26)}{chr(97 + n % 26)}" for n in range(count)])


@pytest.fixture(scope="module")
def tokenizer() -> Letters:
    return letters()


@pytest.fixture(scope="module")
def passages(tokenizer: Letters) -> Passages:
    return Passages.of(["the quick brown fox " * 40, "lorem ipsum dolor " * 50], tokenizer)


def test_facts_are_about_the_rarer_words(tokenizer: Letters) -> None:
    words = words_of(tokenizer)
    assert len(set(words.every)) == NUM_WORDS
    assert len(words.of_facts) == NUM_OF_FACTS and NUM_OF_FACTS % NUM_DEPTHS == 0
    assert set(words.of_facts) == set(tokenizer.pieces[7 + NUM_WORDS - NUM_OF_FACTS : 7 + NUM_WORDS])
    assert words_of(tokenizer) == words


def test_no_needle_is_a_fact_that_is_trained_on(tokenizer: Letters) -> None:
    words = words_of(tokenizer).of_facts
    share = np.mean([is_heldout(key, value) for key in words[:40] for value in words[40:80]])
    assert share == pytest.approx(HELDOUT_SHARE, abs=0.03)
    random = np.random.default_rng(2)
    facts = [fact for _ in range(20) for fact in random_facts(words, 30, random)]
    assert len(facts) > 400 and not any(is_heldout(*fact) for fact in facts)


def test_a_vocabulary_of_too_few_words() -> None:
    with pytest.raises(DataError, match="larger vocabulary"):
        words_of(letters(20))


def test_a_document_tells_each_fact_before_it_asks(tokenizer: Letters, passages: Passages) -> None:
    random = np.random.default_rng(3)
    facts = random_facts(words_of(tokenizer).of_facts, 9, random)[:5]
    parts = fact_document(passages, facts, [0.0, 0.2, 0.5, 0.9, 1.0], [4, 0, 2], 400, random)
    text = "".join(text for text, _ in parts)
    for key, value in facts:
        assert f"Name:{key}{value}." in text
    assert [value for value, loss in parts if loss] == [facts[n][1] for n in (4, 0, 2)]
    for number, (value, loss) in enumerate(parts):
        if loss:
            before = parts[number - 1][0]
            assert before.endswith(f"\nName:{ {v: k for k, v in facts}[value] }")
    num_tokens = sum(part.num_tokens for part in text_parts(parts, tokenizer))
    assert 380 <= num_tokens <= 400
    assert text.index(facts[0][0]) < 20, "the first fact is at depth 0"


def test_questions_have_answers_of_one_token(tokenizer: Letters, passages: Passages) -> None:
    random = np.random.default_rng(4)
    facts = random_facts(words_of(tokenizer).of_facts, 16, random)[:8]
    parts = text_parts(fact_document(passages, facts, [0.5] * 8, range(8), 300, random), tokenizer)
    assert [part.num_tokens for part in parts if part.loss] == [1] * 8


def test_a_list_is_said_twice(tokenizer: Letters) -> None:
    (first, _), (second, loss) = list_document(words_of(tokenizer).every, 6, np.random.default_rng(5))
    assert first == f"{second}.\n" and loss
    assert len(set(second.split())) == 6


# A model of three dimensions and six tokens, whose head says the token of the largest entry.
HEAD = torch.tensor([[1.0, 0, 0], [0, 1, 0], [0, 0, 1], [-1, 0, 0], [0, -1, 0], [0, 0, -1]])
WORDS = torch.tensor([1, 2, 4])


def test_scores_of_a_model_made_by_hand() -> None:
    hidden = torch.tensor([[0.0, 3, 1], [0, 3, 1], [9, 2, 1], [0, 0, 0.5]])
    labels = torch.tensor([1, 2, 1, 2])
    found = scores(hidden, HEAD, labels, WORDS)
    # Token 1: found once; at the third place token 0, which is no answer, is likelier. Token 2: once of two.
    assert found[0].tolist() == [2, 1, pytest.approx((3 - 1) + (2 - 1))]
    assert found[1].tolist() == [2, 1, pytest.approx((1 - 3) + (0.5 - 0))]
    assert found[2].tolist() == [0, 0, 0]


def test_margins_are_from_other_answers_where_all_logits_are_negative() -> None:
    found = scores(torch.tensor([[0.0, -3, -1]]), HEAD, torch.tensor([1]), torch.tensor([1, 2]))
    assert found[0].tolist() == [1, 0, pytest.approx(-3 - -1)]


def test_answers_that_are_no_words_do_not_count() -> None:
    assert scores(torch.ones(2, 3), HEAD, torch.tensor([0, 5]), WORDS).sum() == 0


def test_scores_by_depth() -> None:
    # Four answers at two depths: 0 and 2 are at the first, 1 and 3 at the second.
    score = by_depth(64, 2, [[2, 2, 4.0], [1, 0, -3.0], [2, 1, 0.0], [3, 1, 1.0]])
    assert [each.depth for each in score.depths] == [0.0, 1.0]
    assert [each.found for each in score.depths] == [0.75, 0.25]
    assert [each.margin for each in score.depths] == [1.0, -0.5]
    assert score.found == 0.5 and score.margin == 0.25
    assert NeedleScore.of(json.loads(json.dumps(score.to_json()))) == score
    assert lines_of(score)[-1].split() == ["all", "8", "50%", "+0.25"]


def test_a_depth_without_needles_is_an_error() -> None:
    with pytest.raises(DataError, match="no needle at depth 2"):
        by_depth(64, 2, [[1, 0, 0], [0, 0, 0]])


def test_a_search_reads_nothing_but_its_documents() -> None:
    from pathlib import Path

    found = settings(Path("there"), "1024")
    assert "train.seq_len=1024" in found
    assert "data.sources={needles: {format: shards, path: there/needles_1024}}" in found
