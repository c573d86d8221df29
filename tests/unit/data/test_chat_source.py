"""A source of conversations from its files to documents: indexed by stretches, opened, laid out, masked."""

import json
from dataclasses import replace
from itertools import accumulate, pairwise
from pathlib import Path

import numpy as np
import pytest

from k25_train.config.data import DataConfig
from k25_train.config.sources import SourceConfig, SourceFormat
from k25_train.data.chat import format as chat_format
from k25_train.data.commands.indexing import index_source
from k25_train.data.formats.left_out import left_out_of
from k25_train.data.loader import DataLoader
from k25_train.data.mix.documents import DocumentBuilder
from k25_train.data.open_source import open_source
from k25_train.data.tokenizer import load_tokenizer, train_tokenizer
from k25_train.errors import DataError
from tests.helpers.chat_goldens import CLOSE, OPEN, without_mask, write_chat_source, write_kimi_vocabulary
from tests.helpers.tiny_shards import (
    all_words,
    tiny_data_config,
    tiny_train_config,
    tiny_vision_config,
)


def data_of(folder: Path, path: str = "chat/*.jsonl") -> DataConfig:
    """A configuration with one source of conversations."""
    return replace(
        tiny_data_config(folder),
        tokenizer=str(folder / "tiktoken.model"),
        sources={"chat": SourceConfig(format=SourceFormat.chat, path=path)},
    )


@pytest.mark.parametrize("stretch_bytes", [2**28, 300])
def test_documents_are_those_of_the_files(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    stretch_bytes: int,
) -> None:
    monkeypatch.setattr(chat_format, "STRETCH_BYTES", stretch_bytes)
    expected = write_chat_source(tmp_path)
    data = data_of(tmp_path)
    tokenizer = load_tokenizer(tmp_path / "tiktoken.model")
    header = index_source("chat", data, str(data.tokenizer), 0, lambda *_: None)
    assert header is not None and (header.num_items, header.num_media, header.frame) == (
        len(expected),
        4,
        False,
    )
    assert index_source("chat", data, str(data.tokenizer), 0, lambda *_: None) is None

    source = open_source("chat", data, tokenizer, checks_shards=True)
    number, [line] = left_out_of(source.index.shards())
    assert number == 1 and "1.jsonl, line 5: is not valid JSON" in line
    builder = DocumentBuilder(source.reader, tokenizer, tiny_vision_config(), frame=source.index.header.frame)
    for item, drawn in enumerate(expected):
        record = source.index.record(item)
        document = builder.tokens(record, builder.media(record))
        assert document.failure is None
        # A picture of 56x28 is two tokens.
        text = without_mask(drawn).replace("<|media_pad|>", "<|media_pad|><|media_pad|>")
        assert tokenizer.decode(document.tokens.tolist()) == text
        learned = "".join(part.partition(CLOSE)[0] for part in drawn.split(OPEN)[1:])
        assert tokenizer.decode(document.tokens[document.is_target].tolist()) == learned
        assert not np.isin(document.tokens, (tokenizer.bos, tokenizer.eos)).any()


def test_the_loader_serves_whole_conversations_with_their_mask(tmp_path: Path) -> None:
    expected = write_chat_source(tmp_path)
    data = replace(data_of(tmp_path), max_skipped_samples=99)
    index_source("chat", data, str(data.tokenizer), 0, lambda *_: None)
    tokenizer = load_tokenizer(tmp_path / "tiktoken.model")
    train = replace(tiny_train_config(), seq_len=512, global_batch_size=len(expected), micro_batch_size=1)
    loader = DataLoader(data, train, tiny_vision_config())
    plan = loader.plan(0)
    batches = loader.micro_batches(plan, dp_rank=0, dp_size=1, reads=all_words(with_pixels=True))
    served = set()
    for batch in batches:
        ends = list(accumulate(batch.document_lengths))
        for number, (start, end) in enumerate(pairwise([0, *ends])):
            if number not in batch.padding:
                learned = batch.labels[start:end][batch.loss_mask[start:end] > 0].tolist()
                served.add((tokenizer.decode(batch.tokens[start:end].tolist()), tokenizer.decode(learned)))
        assert not batch.failed_items and not batch.unreadable
    assert served == {
        (
            without_mask(drawn).replace("<|media_pad|>", "<|media_pad|><|media_pad|>"),
            "".join(part.partition(CLOSE)[0] for part in drawn.split(OPEN)[1:]),
        )
        for drawn in expected
    }


def test_what_cannot_be_indexed_is_refused_by_name(tmp_path: Path) -> None:
    write_chat_source(tmp_path)
    (tmp_path / "chat" / "bad.jsonl").write_text(json.dumps({"conversations": []}) + "\n")
    data = data_of(tmp_path, "chat/bad.jsonl")
    with pytest.raises(DataError, match=r"bad\.jsonl: none of its 1 lines is a conversation"):
        index_source("chat", data, str(data.tokenizer), 0, lambda *_: None)
    train_tokenizer(["the quick brown fox"] * 9, 270, tmp_path / "plain.json")
    with pytest.raises(DataError, match=r"data\.sources\.chat: has no <\|im_end\|>"):
        index_source("chat", data_of(tmp_path), str(tmp_path / "plain.json"), 0, lambda *_: None)


def test_an_exact_name_is_that_file_alone(tmp_path: Path) -> None:
    write_chat_source(tmp_path)
    (tmp_path / "chat" / "2.json").write_text("{")
    data = data_of(tmp_path, "chat/2.jsonl")
    header = index_source("chat", data, str(data.tokenizer), 0, lambda *_: None)
    assert header is not None and header.num_items == 2


def asked(*answers: dict[str, object], user: str = "Hi") -> str:
    return json.dumps({"messages": [{"role": "user", "content": user}, *answers]}) + "\n"


def test_bad_answers_and_calls_are_told_by_file_and_line_and_counted(tmp_path: Path) -> None:
    write_kimi_vocabulary(tmp_path / "tiktoken.model")
    (tmp_path / "chat").mkdir()
    call = {"id": "functions.f:0", "function": {"name": "f", "arguments": "{'x': 1}"}}
    bad = [
        asked({"role": "assistant", "content": None, "tool_calls": [call]}),
        asked({"role": "tool", "tool_call_id": "functions.f:0", "content": "r"}),
        asked({"role": "assistant", "content": ""}),
        asked({"role": "assistant", "content": "It is", "finish_reason": "length"}),
        asked({"role": "narrator", "content": "He left."}),
    ]
    good = asked({"role": "assistant", "content": "Hello."})
    (tmp_path / "chat" / "a.jsonl").write_text(good + "".join(bad) + good)
    data = data_of(tmp_path)
    header = index_source("chat", data, str(data.tokenizer), 0, lambda *_: None)
    assert header is not None and header.num_items == 2
    tokenizer = load_tokenizer(tmp_path / "tiktoken.model")
    source = open_source("chat", data, tokenizer, checks_shards=True)
    number, told = left_out_of(source.index.shards())
    assert number == len(bad)
    for line, (text, reason) in enumerate(
        zip(
            told,
            (
                "the arguments of message 1, tool call 0 are not valid JSON",
                "is the result of call 'functions.f:0', which nobody has made",
                "message 1 is an empty answer",
                "message 1 was cut off at a limit of tokens",
                "message 1 has the role 'narrator'; known ones",
            ),
            strict=True,
        ),
        start=2,
    ):
        assert text.startswith(f"a.jsonl, line {line}: ") and reason in text


def test_an_answer_that_just_fits_is_whole_and_a_longer_one_is_told(tmp_path: Path) -> None:
    write_kimi_vocabulary(tmp_path / "tiktoken.model")
    (tmp_path / "chat").mkdir()
    talks = [asked({"role": "assistant", "content": "a " * words}, user="count") for words in (3, 20, 200)]
    (tmp_path / "chat" / "a.jsonl").write_text("".join(talks) * 4)
    data = replace(data_of(tmp_path), max_skipped_samples=9)
    index_source("chat", data, str(data.tokenizer), 0, lambda *_: None)
    tokenizer = load_tokenizer(tmp_path / "tiktoken.model")
    source = open_source("chat", data, tokenizer, checks_shards=True)
    length = sum(segment.num_tokens for segment in source.index.record(1).segments)  # type: ignore[union-attr]
    train = replace(tiny_train_config(), seq_len=length, global_batch_size=8, micro_batch_size=1)
    with DataLoader(data, train, tiny_vision_config()) as loader:
        plan = loader.plan(0)
        batches = loader.micro_batches(plan, dp_rank=0, dp_size=1, reads=all_words(with_pixels=False))
        served = {each.pieces[0].length: batch for each, batch in zip(plan.sequences, batches, strict=True)}
        assert max(served) == length
        told = loader.skip_log.skipped
    assert len(told) == 4
    assert all("is not cut, train.seq_len is" in reason for reason in told.values())
    # Of the one that just fits, the end of the answer is learned.
    end = tokenizer.chat_ids["<|im_end|>"]
    assert int(served[length].labels[served[length].loss_mask > 0][-1]) == end
