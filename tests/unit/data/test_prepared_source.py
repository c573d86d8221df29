"""From JSON lines to what a rank trains on: `k25-data prepare`, `k25-data index`, and the source's reader."""

import json
from dataclasses import replace
from pathlib import Path

import pytest

from k25_train.config.data import DataConfig
from k25_train.config.sources import SourceConfig, SourceFormat
from k25_train.data.commands.indexing import index_source
from k25_train.data.open_source import open_source
from k25_train.data.tokenizer import load_tokenizer
from k25_train.errors import DataError
from tests.helpers.text_corpus import prepare, texts, write_lines, write_tokenizer
from tests.helpers.tiny_shards import tiny_data_config

TEXTS = texts(40)


def data_of(folder: Path, tokenizer: Path) -> DataConfig:
    """A data set of all shards in a folder."""
    sources = {"mine": SourceConfig(format=SourceFormat.indexed, path="text-*")}
    return replace(tiny_data_config(Path("/")), dir=str(folder), tokenizer=str(tokenizer), sources=sources)


def index(data: DataConfig) -> None:
    """Index the source in this process."""
    index_source("mine", data, str(data.tokenizer), 0, lambda *_: None, force=False)


@pytest.mark.parametrize("append_eod", [False, True])
@pytest.mark.parametrize("name", ["tokenizer.json", "tiktoken.model"])
def test_training_reads_the_tokens_of_the_texts(tmp_path: Path, name: str, *, append_eod: bool) -> None:
    path = write_tokenizer(tmp_path / name)
    lines = write_lines(tmp_path / "a.jsonl", TEXTS)
    prepare([lines], f"{tmp_path}/out/", path, append_eod=append_eod, shard_tokens=300)
    data = data_of(tmp_path / "out", path)
    index(data)
    source = open_source("mine", data, load_tokenizer(path), checks_shards=True)
    assert source.index.header.frame and len(list((tmp_path / "out").glob("*.bin"))) > 2
    records = [source.index.record(item) for item in range(len(TEXTS))]
    found = [source.reader.segment_tokens(each, 0, 0, each.num_text_tokens) for each in records]
    assert [list(ids) for ids in found] == load_tokenizer(path).encode_batch(TEXTS)


def test_tokens_of_another_tokenizer_are_refused(tmp_path: Path) -> None:
    path = write_tokenizer(tmp_path / "tokenizer.json")
    prepare([write_lines(tmp_path / "a.jsonl", TEXTS)], f"{tmp_path}/out/", path)
    other = tmp_path / "other.json"
    other.write_bytes(path.read_bytes() + b"\n")
    with pytest.raises(DataError, match="prepared with another tokenizer"):
        index(data_of(tmp_path / "out", other))
    facts = tmp_path / "out" / "text-00000.json"
    facts.write_text(json.dumps({**json.loads(facts.read_text()), "bin_bytes": 2}))
    with pytest.raises(DataError, match="cut short"):
        index(data_of(tmp_path / "out", path))
    # What another program has put there says nothing.
    facts.write_text("[")
    index(data_of(tmp_path / "out", other))
