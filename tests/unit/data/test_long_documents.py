"""Documents that are encoded piece by piece: every stretch has the tokens that the whole has there."""

import base64
import json
import random
import threading
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from k25_train.data import text_parts
from k25_train.data.byte_cache import ByteCache
from k25_train.data.formats.dataset import load_dataset
from k25_train.data.formats.sample_json import Words
from k25_train.data.formats.texts import TextTokens
from k25_train.data.mix import documents
from k25_train.data.mix.documents import DocumentBuilder
from k25_train.data.smoke_set.verify import verify_dataset
from k25_train.data.tokenizer import Tokenizer, load_tokenizer, train_tokenizer
from tests.helpers.tiny_shards import (
    Prompt,
    Sample,
    make_image,
    make_text,
    tiny_vision_config,
    words_reader,
    write_shard_set,
)

PIECES = [
    *(
        "one",
        " two",
        " it's",
        "I'LL",
        " 12345",
        "1",
        "a",
        "é",
        "漢字",
        "。",
        "\u3000",
        "\u2028",
        "\x1c",
        "\x85",
    ),
    *(" ", "  ", "\n", "\r\n", "\n\n  ", "\t", "!", " ...\n", "'", "' ", "-", "ǅ", "\u0301", "\0"),
]


@pytest.fixture(scope="module", params=["trained", "kimi"])
def tokenizer(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    folder = tmp_path_factory.mktemp("tokenizer")
    if request.param == "trained":
        train_tokenizer([make_text(300, 1) + " it's one\n\n two 12\n"] * 4, 300, folder / "tokenizer.json")
        return load_tokenizer(folder / "tokenizer.json")
    merges = [b" t", b"  ", b"\n\n", b" two", b"on", b"one", b"'s", b"\n ", b" \n", b"12", b"e ", b"!\n"]
    tokens = [*(bytes([i]) for i in range(256)), *merges]
    lines = (f"{base64.b64encode(token).decode()} {rank}\n" for rank, token in enumerate(tokens))
    (folder / "tiktoken.model").write_text("".join(lines), encoding="utf-8")
    return load_tokenizer(folder / "tiktoken.model")


@settings(max_examples=300, deadline=None)
@given(text=st.one_of(st.lists(st.sampled_from(PIECES), max_size=40).map("".join), st.text(max_size=60)))
def test_tokens_of_the_parts_are_those_of_the_text(tokenizer: Tokenizer, text: str) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(text_parts, "PART_CHARACTERS", 1)
        parts = tokenizer.parts(text)

    assert "".join(parts) == text
    assert [token for tokens in tokenizer.encode_batch(parts) for token in tokens] == tokenizer.encode(text)


def test_a_vocabulary_with_another_pattern_is_not_cut(tmp_path: Path) -> None:
    train_tokenizer([make_text(300, 1)], 290, tmp_path / "tokenizer.json")
    content = json.loads((tmp_path / "tokenizer.json").read_text(encoding="utf-8"))
    content["pre_tokenizer"]["pretokenizers"][0]["pattern"] = {"Regex": r"\S+\s\S+|\s+"}
    (tmp_path / "other.json").write_text(json.dumps(content), encoding="utf-8")

    text = make_text(2000, 2)
    assert len(load_tokenizer(tmp_path / "tokenizer.json").parts(text)) > 3
    assert load_tokenizer(tmp_path / "other.json").parts(text) == [text]


def test_every_stretch_of_a_document_is_that_of_the_whole(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(text_parts, "PART_CHARACTERS", 40)
    parts = [Prompt(make_text(60, 1)), make_image(40, 28, "png", 3), make_text(80, 2)]
    samples = [Sample("text", "text", [make_text(150, 3)]), Sample("caption", "caption", parts)]
    folder = write_shard_set(tmp_path / "set", {"train": samples})
    dataset = load_dataset(str(folder))
    tokenizer = load_tokenizer(dataset.tokenizer_path)
    builder = DocumentBuilder(words_reader(dataset, tokenizer), tokenizer, tiny_vision_config())
    rng = random.Random(1)
    for record in dataset.splits["train"]:
        media = builder.media(record)
        whole = builder.tokens(record, media)
        length = len(whole.tokens)
        assert length == builder.num_tokens(record)

        monkeypatch.setattr(documents, "LONG_DOCUMENT_TOKENS", 0)
        spans = [sorted(rng.sample(range(length + 1), 2)) for _ in range(30)] + [[0, length], [0, 1]]
        for start, stop in spans:
            stretch = builder.tokens(record, media, start, stop)
            assert np.array_equal(stretch.tokens, whole.tokens[start:stop])
            assert np.array_equal(stretch.is_target, whole.is_target[start:stop])
        monkeypatch.setattr(documents, "LONG_DOCUMENT_TOKENS", 10**6)


def test_writer_stores_the_counts_of_long_texts_and_verify_checks_them(tmp_path: Path) -> None:
    samples = [Sample("long", "text", [make_text(3000, 1)]), Sample("short", "text", [make_text(30, 2)])]
    folder = write_shard_set(tmp_path / "set", {"train": samples})
    dataset = load_dataset(str(folder))
    long, short = dataset.splits["train"]
    (words,), (short_words,) = (dataset.reader.read_words(record) for record in (long, short))
    tokenizer = load_tokenizer(dataset.tokenizer_path)

    assert words.part_tokens == tokenizer.part_tokens(words.text)
    assert sum(words.part_tokens) == long.num_text_tokens
    assert short_words.part_tokens == ()

    # Counts that are wrong cost their sample, and are named.
    shard = folder / long.shard
    stored = json.dumps({"part_tokens": words.part_tokens})[1:-1].encode()
    first, second, *rest = words.part_tokens
    assert len(str(first - 1)) == len(str(first)) and len(str(second + 1)) == len(str(second))
    wrong = json.dumps({"part_tokens": [first - 1, second + 1, *rest]})[1:-1].encode()
    assert shard.read_bytes().count(stored) == 1
    shard.write_bytes(shard.read_bytes().replace(stored, wrong))
    faults = "\n".join(verify_dataset(folder, lambda line: None))
    assert "sample long: a text's parts have" in faults
    texts = TextTokens(tokenizer)
    wrong_words = Words(words.text, (first - 1, second + 1, *rest))
    with pytest.raises(Exception, match=f"part 0 of a text has {first} tokens, {first - 1} are stored"):
        texts.stretch(long, 0, wrong_words, long.num_text_tokens, 0, 5)


def test_a_text_without_counts_is_encoded_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = write_shard_set(tmp_path / "set", {"train": [Sample("long", "text", [make_text(3000, 1)])]})
    dataset = load_dataset(str(folder))
    tokenizer = load_tokenizer(dataset.tokenizer_path)
    (record,) = dataset.splits["train"]
    (words,) = dataset.reader.read_words(record)
    whole = tokenizer.encode(words.text)
    encoded = 0
    encode_batch = tokenizer.encode_batch

    def count(texts: list[str]) -> list[list[int]]:
        nonlocal encoded
        encoded += sum(map(len, texts))
        return encode_batch(texts)

    monkeypatch.setattr(tokenizer, "encode_batch", count)
    texts = TextTokens(tokenizer)
    for start in range(0, 4000, 100):
        plain = Words(words.text, ())
        assert texts.stretch(record, 0, plain, len(whole), start, start + 100) == whole[start : start + 100]

    # Once for the counts, then about what the forty stretches lie in.
    assert encoded < len(words.text) + 40 * 3 * text_parts.PART_CHARACTERS


def test_cache_is_bounded_by_bytes_and_safe_across_threads() -> None:
    cache = ByteCache[bytes](1000, len)
    assert cache.get("a", lambda: bytes(600)) is cache.get("a", lambda: b"other")
    cache.get("b", lambda: bytes(300))
    cache.get("a", lambda: b"other")
    cache.get("c", lambda: bytes(300))  # drops b, which was used longest ago
    assert cache.held_bytes == 900
    assert cache.get("b", lambda: b"new") == b"new"
    assert len(cache.get("too large", lambda: bytes(2000))) == 2000
    assert cache.held_bytes <= 1000

    def use(seed: int) -> None:
        rng = random.Random(seed)
        for _ in range(2000):
            key = rng.randrange(30)
            assert len(cache.get(key, lambda key=key: bytes(10 * key))) == 10 * key

    threads = [threading.Thread(target=use, args=(seed,)) for seed in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert 0 <= cache.held_bytes <= 1000
    cache.clear()
    assert cache.held_bytes == 0
