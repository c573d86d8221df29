"""A shard set with an index trains as it does in memory; a large one is not read into memory."""

import multiprocessing
import random
import shutil
import signal
import time
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

import pytest
import torch

from k25_train.config.data import DataConfig
from k25_train.config.sources import SourceConfig, SourceFormat
from k25_train.data.batch import MicroBatch
from k25_train.data.commands.indexing import index_source
from k25_train.data.formats import shards
from k25_train.data.formats.dataset import load_dataset
from k25_train.data.formats.records import SampleRecord
from k25_train.data.formats.source_files import SourceFiles
from k25_train.data.loader import DataLoader
from k25_train.data.open_source import StaleIndexError, open_source
from k25_train.data.source_items import IndexItems, RecordItems
from k25_train.data.tokenizer import load_tokenizer
from k25_train.errors import DataError
from tests.helpers.tiny_shards import (
    Sample,
    all_words,
    make_image,
    tiny_data_config,
    tiny_train_config,
    tiny_vision_config,
    write_shard_set,
    write_tiny_shard_set,
)

OLD_SET = Path(__file__).parents[2] / "golden" / "shard_set_v1"


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tiny_shard_set(tmp_path_factory.mktemp("tiny") / "set")


@pytest.fixture(scope="module")
def indexed(tiny: Path) -> Path:
    """The same with an index for each kind, copied after it was indexed."""
    folder = tiny.with_name("indexed")
    shutil.copytree(tiny, folder)
    index_all(tiny_data_config(folder))
    shutil.copytree(folder, tiny.with_name("copy"), copy_function=shutil.copyfile)
    return tiny.with_name("copy")


def index_all(data: DataConfig, *, workers: int = 0) -> None:
    for name in data.sources:
        path = f"{data.dir}/tokenizer.json"
        assert index_source(name, data, path, workers, lambda *_: None) is not None
        assert index_source(name, data, path, workers, lambda *_: None) is None, "nothing has changed"


def open_loader(data: DataConfig) -> DataLoader:
    return DataLoader(data, tiny_train_config(), tiny_vision_config())


def batches_of(loader: DataLoader) -> list[MicroBatch]:
    """Of two steps and an evaluation."""
    plans = [loader.plan(0), loader.plan(9), loader.plan_evaluation(8)]
    reads = all_words(with_pixels=True)
    return [each for plan in plans for each in loader.micro_batches(plan, dp_rank=0, dp_size=1, reads=reads)]


def same(one: Any, other: Any) -> bool:
    return torch.equal(one, other) if isinstance(one, torch.Tensor) else bool(one == other)


@pytest.mark.parametrize("changes", [{}, {"limit_samples": 3}])
def test_batches_and_facts_are_those_of_the_set_in_memory(
    tiny: Path, indexed: Path, changes: dict[str, Any]
) -> None:
    in_memory = open_loader(replace(tiny_data_config(tiny), **changes))
    by_index = open_loader(replace(tiny_data_config(indexed), **changes))
    assert all(isinstance(each.training, RecordItems) for each in in_memory.sources.values())
    assert all(isinstance(each.training, IndexItems) for each in by_index.sources.values())
    assert by_index.facts() == in_memory.facts()
    for one, other in zip(batches_of(by_index), batches_of(in_memory), strict=True):
        for field in fields(MicroBatch):
            assert same(getattr(one, field.name), getattr(other, field.name)), field.name


def test_a_large_set_is_refused_without_an_index(
    tiny: Path, indexed: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(shards, "MOST_IN_MEMORY", 72)
    with pytest.raises(
        DataError, match=r"72 samples and no index for data.sources.text.*index data=NAME --s"
    ):
        open_loader(tiny_data_config(tiny))
    open_loader(tiny_data_config(indexed))


def all_of(folder: Path, **changes: Any) -> DataConfig:
    source = replace(SourceConfig(format=SourceFormat.shards, path="."), **changes)
    return replace(tiny_data_config(folder), sources={"all": source})


def without_source(records: tuple[SampleRecord, ...]) -> list[SampleRecord]:
    return [replace(record, source="") for record in records]


def test_an_old_set_keeps_what_it_says(tmp_path: Path) -> None:
    folder = Path(shutil.copytree(OLD_SET, tmp_path / "set"))
    data = all_of(folder)
    index_all(data)
    source = open_source("all", data, load_tokenizer(folder / "tokenizer.json"), checks_shards=True)
    for split, records in load_dataset(str(folder)).splits.items():
        first, stop = source.items_of(split)
        found = tuple(source.index.record(item) for item in range(first, stop))
        assert without_source(found) == without_source(records)
    # It has no checksums, so its shards must not have been written since.
    shard = next(folder.glob("*.tar"))
    shard.write_bytes(shard.read_bytes())
    with pytest.raises(StaleIndexError, match="was written since"):
        open_source("all", data, load_tokenizer(folder / "tokenizer.json"), checks_shards=True)


def test_an_index_of_something_else_is_refused(indexed: Path, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(indexed, tmp_path / "set"))
    tokenizer = load_tokenizer(folder / "tokenizer.json")
    with pytest.raises(StaleIndexError, match=r"has the kinds \['text'\], data.sources.all.kinds are all"):
        open_source("all", all_of(folder, index="shards-text.k25index"), tokenizer, checks_shards=True)
    shard = folder / "train-00000.tar"
    shard.write_bytes(shard.read_bytes()[:-512])
    with pytest.raises(StaleIndexError, match=r"train-00000.tar: has .* cut short"):
        open_loader(tiny_data_config(folder))
    with pytest.raises(DataError, match=r"has \d+ bytes but its index says"):
        index_source("text", tiny_data_config(folder), str(folder / "tokenizer.json"), 0, lambda *_: None)


def test_what_is_not_of_its_kind_is_left_out(tmp_path: Path) -> None:
    picture = make_image(28, 28, "png", seed=1)
    samples = [Sample("a", "text", ["red"]), Sample("b", "text", [picture]), Sample("c", "ocr", ["blue"])]
    data = all_of(write_shard_set(tmp_path, {"train": samples}))
    index_all(data)
    source = open_source("all", data, load_tokenizer(tmp_path / "tokenizer.json"), checks_shards=True)
    assert [source.index.record(item).key for item in range(len(source.index))] == ["a"]
    assert not source.index.has_media
    assert source.index.shard(0).facts["num_left_out"] == 2
    assert SourceFiles("all", data).index == f"{tmp_path}/shards.k25index"


@pytest.mark.parametrize("num_kills", [4, pytest.param(60, marks=pytest.mark.slow)])
def test_killed_at_any_moment(tiny: Path, indexed: Path, tmp_path: Path, num_kills: int) -> None:
    """What is killed is made when the command is given again, with the same bytes and nothing left behind."""
    folder = Path(shutil.copytree(tiny, tmp_path / "set"))
    data, draw = tiny_data_config(folder), random.Random(num_kills)
    started_s = time.monotonic()
    index_all(data)
    longest_s = time.monotonic() - started_s
    wanted = {path.name: path.read_bytes() for path in folder.iterdir()}
    assert len([name for name in wanted if name.endswith(".k25index")]) == 4
    num_killed = 0
    for _ in range(num_kills):
        for path in folder.glob("*.k25index"):
            path.unlink()
        child = multiprocessing.get_context("fork").Process(target=index_all, args=(data,))
        child.start()
        child.join(draw.uniform(0, longest_s))
        child.kill()
        child.join()
        num_killed += child.exitcode == -signal.SIGKILL
        for name in data.sources:
            index_source(name, data, f"{folder}/tokenizer.json", 0, lambda *_: None)
        assert {path.name: path.read_bytes() for path in folder.iterdir()} == wanted
    assert num_killed
