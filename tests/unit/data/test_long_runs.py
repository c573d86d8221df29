"""Kimi's tokens are the release's on any text, by a plain reading of its rule, and no text is too long."""

import base64
import itertools
import random

import pytest
import tiktoken
from hypothesis import given, settings
from hypothesis import strategies as st

from k25_train.data import long_runs
from k25_train.data.kimi_tokens import SPLIT_PATTERN
from k25_train.data.long_runs import PanicErrors, cut_long_runs
from k25_train.data.tokenizer import Tokenizer, load_tokenizer, train_tokenizer

MERGES = [b"aa", b"aaaa", b"  ", b"    ", b"\n\n", b"ab", b" a"]
RANKS = {token: rank for rank, token in enumerate([*(bytes([i]) for i in range(256)), *MERGES])}
ODD_BLANKS = "\u00a0\u1680\u2003\u2028\u2029\u3000\x85\x1c\x1f\x0b\x0c"
NO_BLANKS = "\u200b\u180e\ufeff\u2060\0漢é"


@pytest.fixture(scope="module")
def kimi(tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    path = tmp_path_factory.mktemp("kimi") / "tiktoken.model"
    path.write_text("".join(f"{base64.b64encode(token).decode()} {rank}\n" for token, rank in RANKS.items()))
    return load_tokenizer(path)


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    path = tmp_path_factory.mktemp("trained") / "tokenizer.json"
    train_tokenizer(["the red green blue  small large\n"] * 40, 280, path)
    return load_tokenizer(path)


def parts_of(text: str, stretch: int, run: int) -> list[str]:
    """The rule, character by character: no part has characters of two stretches, nor `run` + 1 in a row that
    are all blank or all not."""
    parts = []
    for start in range(0, len(text), stretch):
        part, in_a_row = "", 0
        for position, character in enumerate(text[start : start + stretch], start):
            same = position > start and character.isspace() == text[position - 1].isspace()
            in_a_row = in_a_row + 1 if same else 1
            if in_a_row > run:
                parts.append(part)
                part, in_a_row = "", 1
            part += character
        parts.append(part)
    return parts


runs = st.lists(
    st.tuples(st.sampled_from(f" \n\tab1!{ODD_BLANKS}{NO_BLANKS}"), st.integers(1, 12)), max_size=20
)


@settings(max_examples=150, deadline=None)
@given(runs=runs)
def test_parts_are_those_of_the_rule(runs: list[tuple[str, int]]) -> None:
    text = "".join(character * count for character, count in runs)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(long_runs, "MAX_CHARACTERS", 23)
        patch.setattr(long_runs, "MAX_RUN", 4)

        parts = list(cut_long_runs(text))

    expected = parts_of(text, 23, 4)
    assert parts == (expected or [""])


LONG = {
    "blanks": " " * 1_000_000,
    "letters": "a" * 1_000_000,
    "odd blanks": "\u3000" * 450_000,
    "zero width": "\u200b" * 450_000,
    "line breaks and blanks": "\n " * 300_000,
    "runs around the limit": "".join(
        c * n for c, n in itertools.product("a \n", (24_999, 25_000, 25_001, 49_999, 50_000, 50_001))
    ),
    "a run over the end of a stretch": "a b " * 97_500 + "a" * 30_000 + " " * 30_000,
    "a run that ends with the stretch": "a b " * 93_750 + "a" * 25_000 + "a" * 25_000 + " ",
    "one character more": "ab " * 133_333 + "aa",
    "words": " ".join(random.Random(1).choices(["aa", "ab", "b\n", "é漢", "12 "], k=200_000)),
}


@pytest.mark.parametrize("text", LONG.values(), ids=LONG.keys())
def test_tokens_of_long_texts_are_the_release_s(kimi: Tokenizer, text: str) -> None:
    bare = tiktoken.Encoding(name="bare", pat_str=SPLIT_PATTERN, mergeable_ranks=RANKS, special_tokens={})

    expected = [token for part in parts_of(text, 400_000, 25_000) for token in bare.encode_ordinary(part)]

    assert kimi.encode(text) == expected
    assert kimi.decode(expected) == text


@settings(max_examples=100, deadline=None)
@given(text=st.text(max_size=300))
def test_short_texts_are_not_cut(text: str) -> None:
    assert list(cut_long_runs(text)) == [text]


def test_blank_is_the_same_to_the_rule_and_to_the_code() -> None:
    everything = map(chr, range(0x4000))
    assert all((long_runs._RUN.match(c + "a").end() == 2) != c.isspace() for c in everything)  # type: ignore[union-attr]


@pytest.mark.parametrize("text", ["\ud83d", "a\ude00b", "\ud83d\ude00", "\ud83d" * 30_000])
def test_half_a_surrogate_pair_is_one_odd_character(kimi: Tokenizer, trained: Tokenizer, text: str) -> None:
    expected = text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")

    assert trained.decode(trained.encode(text)) == expected
    assert kimi.decode(kimi.encode(text)) == expected


@pytest.mark.parametrize(
    "text", [" " * 1_000_000, "a" * 1_000_000, "\u3000" * 300_000, "漢" * 300_000, "!\n" * 300_000]
)
def test_trained_vocabulary_takes_any_length(trained: Tokenizer, text: str) -> None:
    assert trained.decode(trained.encode(text)) == text


def test_special_tokens_across_a_cut_are_plain_text(kimi: Tokenizer) -> None:
    ids = kimi.encode("a" * 24_995 + "[EOS]<|media_pad|>" * 3)

    assert max(ids) < kimi.bos


def test_panic_of_the_library_is_an_error(kimi: Tokenizer) -> None:
    bare = tiktoken.Encoding(name="bare", pat_str=SPLIT_PATTERN, mergeable_ranks=RANKS, special_tokens={})

    with pytest.raises(RuntimeError, match="the tokenizer's library panicked"), PanicErrors():
        bare.encode_ordinary(" " * 1_000_000)
