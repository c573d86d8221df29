"""Both kinds of tokenizer: exact round trips, special tokens that text cannot forge, files refused."""

import base64
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from k25_train.data.kimi_tokens import SPECIAL_TOKENS
from k25_train.data.tokenizer import KimiTokenizer, Tokenizer, load_tokenizer, train_tokenizer
from k25_train.errors import DataError

CORPUS = ["The quick brown fox isn't lazy, it jumped 1234567 times.\n", "def f(x):\n    return x + 1\n"] * 40
VOCAB_SIZE = 310
KIMI_NUM_ORDINARY = 163_584
KIMI_K25_IDS = {
    "bos": 163584,
    "eos": 163585,
    "media_begin": 163602,
    "media_content": 163603,
    "media_end": 163604,
    "media_pad": 163605,
    "pad": 163839,
}


def write_ranks(path: Path, num_ranks: int) -> Path:
    """A vocabulary file in Kimi's format: the bytes, two merges, and made-up tokens up to `num_ranks`."""
    tokens = [bytes([i]) for i in range(256)] + [b"12", b"123"]
    tokens += [b"\xff" + i.to_bytes(3) for i in range(num_ranks - len(tokens))]
    lines = [base64.b64encode(token) + f" {rank}".encode() for rank, token in enumerate(tokens)]
    path.write_bytes(b"\n".join(lines) + b"\n")
    return path


@pytest.fixture(scope="module", params=["trained", "kimi"])
def tokenizer(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    folder = tmp_path_factory.mktemp("tokenizer")
    if request.param == "kimi":
        return load_tokenizer(write_ranks(folder / "tiktoken.model", 300))
    train_tokenizer(CORPUS, VOCAB_SIZE, folder / "tokenizer.json")
    return load_tokenizer(folder / "tokenizer.json")


@settings(max_examples=60, deadline=None)
@given(text=st.text(max_size=200))
def test_any_text_survives_and_has_only_ordinary_tokens(tokenizer: Tokenizer, text: str) -> None:
    ids = tokenizer.encode(text)
    assert tokenizer.decode(ids) == text
    assert all(i < tokenizer.bos for i in ids)


def test_special_tokens_written_in_text_are_plain_text(tokenizer: Tokenizer) -> None:
    text = "a [BOS] b <|media_pad|><|media_end|> [EOS]"
    ids = tokenizer.encode(text)
    assert tokenizer.decode(ids) == text
    assert not set(ids) & {tokenizer.bos, tokenizer.eos, tokenizer.media_pad, tokenizer.media_end}


def test_special_tokens_decode_to_their_names(tokenizer: Tokenizer) -> None:
    ids = [
        *(tokenizer.bos, tokenizer.eos, tokenizer.pad),
        *(tokenizer.media_begin, tokenizer.media_content, tokenizer.media_end, tokenizer.media_pad),
    ]
    assert tuple(tokenizer.decode([i]) for i in ids) == SPECIAL_TOKENS
    assert max(ids) == tokenizer.vocab_size - 1


def test_batches_encode_as_single_texts_do(tokenizer: Tokenizer) -> None:
    texts = ["one", "", "two 22222\n\n"]
    assert tokenizer.encode_batch(texts) == [tokenizer.encode(text) for text in texts]


@pytest.mark.parametrize(
    ("text", "pieces"),
    [
        ("x1234567", ["x", "123", "456", "7"]),
        ("it's  John's", ["it's", " ", " John's"]),
        ("你好world", ["你好", "world"]),
        ("a\n\n  b", ["a", "\n\n", " ", " b"]),
    ],
)
def test_text_is_split_as_by_kimi(tmp_path: Path, text: str, pieces: list[str]) -> None:
    """With every piece in the vocabulary, the tokens are the pieces that the split pattern makes."""
    for vocab_size in range(263 + len(text.encode()), 262, -1):
        try:
            train_tokenizer([text] * 9, vocab_size, tmp_path / "t.json")
            break
        except DataError:
            continue
    tokenizer = load_tokenizer(tmp_path / "t.json")
    assert [tokenizer.decode([i]) for i in tokenizer.encode(text)] == pieces


def test_training_is_deterministic_and_exactly_as_large_as_asked(tmp_path: Path) -> None:
    for name in ("a.json", "b.json"):
        train_tokenizer(CORPUS, VOCAB_SIZE, tmp_path / name)
    assert (tmp_path / "a.json").read_bytes() == (tmp_path / "b.json").read_bytes()
    assert load_tokenizer(tmp_path / "a.json").vocab_size == VOCAB_SIZE


def test_a_vocabulary_that_the_texts_do_not_yield_is_refused(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"vocabulary of 4096 asked for, but the texts yield \d+ tokens"):
        train_tokenizer(CORPUS, 4096, tmp_path / "t.json")


def test_kimi_vocabulary_of_full_size_has_the_published_ids(tmp_path: Path) -> None:
    tokenizer = load_tokenizer(write_ranks(tmp_path / "tiktoken.model", KIMI_NUM_ORDINARY))
    assert isinstance(tokenizer, KimiTokenizer)
    assert {name: getattr(tokenizer, name) for name in KIMI_K25_IDS} == KIMI_K25_IDS
    assert tokenizer.vocab_size == 163_840
    assert tokenizer.decode([163586, 163606, 163600]) == "<|im_end|><think><|reserved_token_163600|>"


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("t.json", b"{}", "not a tokenizer file"),
        ("t.model", b"IQ==\n", "line 1: not `<base64 token> <rank>`"),
        ("t.model", b"IQ== 0\nIg== 1\n", "the file is cut short"),
        ("t.bin", b"", "is a .json file"),
    ],
)
def test_other_files_are_refused_by_name(tmp_path: Path, name: str, content: bytes, message: str) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(DataError, match=message) as caught:
        load_tokenizer(tmp_path / name)
    assert str(tmp_path / name) in str(caught.value)


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="no such tokenizer file"):
        load_tokenizer(tmp_path / "tokenizer.json")
