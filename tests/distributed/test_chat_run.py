"""Conversations train: through index, loader, tower and loss, on one rank and on two that share the batch."""

from dataclasses import replace
from pathlib import Path

import pytest

from k25_train.config.sources import SourceConfig, SourceFormat
from k25_train.data.commands.indexing import index_source
from tests.helpers.chat_goldens import write_chat_source
from tests.helpers.runs import layout, losses_of, overrides
from tests.helpers.smoke_mix import mix
from tests.helpers.tiny_shards import tiny_data_config


def test_conversations_train_alike_on_one_rank_and_two(tmp_path: Path) -> None:
    write_chat_source(tmp_path)
    vocabulary = str(tmp_path / "tiktoken.model")
    source = SourceConfig(format=SourceFormat.chat, path="chat/*.jsonl")
    data = replace(tiny_data_config(tmp_path), tokenizer=vocabulary, sources={"chat": source})
    index_source("chat", data, vocabulary, 0, lambda *_: None)
    arguments = overrides(
        tmp_path,
        tmp_path / "run",
        *mix(),
        "+data.sources.chat={format: chat, path: chat/*.jsonl}",
        f"data.tokenizer={vocabulary}",
        "model.vocab_size=640",
        "train.seq_len=512",
        *"train.steps=2 optim.warmup=1 optim.decay=1".split(),
    )
    one = losses_of([*arguments, *layout()], 1)
    two = losses_of([*arguments, *layout(dp=2)], 2)
    assert one[0][0] > one[1][0] > 0
    assert [loss for loss, _ in two] == pytest.approx([loss for loss, _ in one], rel=1e-5)
