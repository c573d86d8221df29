"""A vocabulary that gets the tokens of conversations and keeps its other ids."""

import json
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from k25_train.data.chat.chat_tokens import ChatTokens
from k25_train.data.chat.messages import parse_conversation
from k25_train.data.chat_set.vocabulary import with_chat_tokens
from k25_train.data.kimi_tokens import CHAT_TOKENS
from k25_train.data.tokenizer import Tokenizer, TrainedTokenizer, train_tokenizer
from k25_train.errors import DataError

TEXTS = ["the quick brown fox jumps over the lazy dog, then the other dog jumps over the quick fox"] * 9


@pytest.fixture(scope="module")
def plain_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A vocabulary without the tokens of conversations."""
    path = tmp_path_factory.mktemp("vocabulary") / "tokenizer.json"
    train_tokenizer(TEXTS, 298, path)
    return path


@pytest.fixture(scope="module")
def plain(plain_file: Path) -> Tokenizer:
    """It, loaded."""
    return TrainedTokenizer("plain", plain_file.read_bytes())


@pytest.fixture(scope="module")
def chat(plain_file: Path) -> Tokenizer:
    """The same with them."""
    return TrainedTokenizer("chat", with_chat_tokens(plain_file.read_bytes(), "plain"))


def test_all_ids_but_those_of_the_last_merges_stay(plain: Tokenizer, chat: Tokenizer) -> None:
    assert chat.vocab_size == plain.vocab_size
    assert (chat.bos, chat.eos, chat.pad, chat.media_pad) == (
        plain.bos,
        plain.eos,
        plain.pad,
        plain.media_pad,
    )
    first = plain.bos - len(CHAT_TOKENS)
    assert list(chat.chat_ids) == list(CHAT_TOKENS)
    assert list(chat.chat_ids.values()) == list(range(first, plain.bos))
    others = [number for number in range(plain.vocab_size) if number not in chat.chat_ids.values()]
    assert [chat.decode([number]) for number in others] == [plain.decode([number]) for number in others]


@settings(max_examples=30, deadline=None)
@given(st.lists(st.sampled_from([*TEXTS[0].split(), " ", "\n", "ü", "<|im_end|>", "xyz"])).map("".join))
def test_texts_without_dropped_tokens_have_the_same_ids(plain: Tokenizer, chat: Tokenizer, text: str) -> None:
    before, after = plain.encode(text), chat.encode(text)
    assert chat.decode(after) == text
    dropped = set(chat.chat_ids.values())
    assert not dropped & set(after)
    if not dropped & set(before):
        assert after == before


def test_some_texts_do_use_dropped_tokens(plain: Tokenizer, chat: Tokenizer) -> None:
    for number in chat.chat_ids.values():
        text = plain.decode([number])
        assert plain.encode(text) == [number]
        parts = chat.encode(text)
        assert len(parts) > 1
        assert chat.decode(parts) == text


def test_a_conversation_round_trips(chat: Tokenizer) -> None:
    messages = [{"role": "user", "content": "the <think> fox"}, {"role": "assistant", "content": "a"}]
    line = json.dumps({"messages": messages}).encode()
    [document] = ChatTokens(chat, "").documents(parse_conversation(line))
    ids = [token for part in document for token in getattr(part, "tokens", ())]
    assert chat.decode(ids) == (
        "<|im_user|>user<|im_middle|>the <think> fox<|im_end|>"
        "<|im_assistant|>assistant<|im_middle|><think></think>a<|im_end|>"
    )
    assert ids.count(chat.chat_ids["<think>"]) == 1


def test_a_token_that_two_merges_make_stays(plain_file: Path) -> None:
    content = json.loads(plain_file.read_bytes())
    merges = content["model"]["merges"]
    last = "".join(merges[-1])
    merges.append(list(merges[-1]))
    changed = json.loads(with_chat_tokens(json.dumps(content).encode(), "x"))["model"]
    assert last in changed["vocab"]
    assert sorted(changed["vocab"].values()) == sorted(content["model"]["vocab"].values())
    assert {part for pair in changed["merges"] for part in (*pair, "".join(pair))} <= changed["vocab"].keys()


def test_one_that_has_them_comes_back_as_it_is(plain_file: Path) -> None:
    chat = with_chat_tokens(plain_file.read_bytes(), "x")
    assert with_chat_tokens(chat, "x") == chat


def test_what_is_no_vocabulary_or_too_small_is_named(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"some\.json: not a tokenizer file"):
        with_chat_tokens(b"{}", "some.json")
    train_tokenizer(TEXTS, 270, tmp_path / "small.json")
    with pytest.raises(DataError, match=r"small\.json: only 7 of its merges.*--vocab-size"):
        with_chat_tokens((tmp_path / "small.json").read_bytes(), "small.json")
