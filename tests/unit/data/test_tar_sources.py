"""Corpora of texts alone, of images alone and of one document are indexed and give whole batches."""

import json
from dataclasses import replace
from pathlib import Path

import pytest

from k25_train.config.sources import SourceConfig, SourceFormat
from k25_train.data.commands.indexing import index_source
from k25_train.data.loader import DataLoader
from k25_train.data.open_source import StaleIndexError, open_source
from k25_train.data.tokenizer import load_tokenizer, train_tokenizer
from tests.helpers.tar_shards import Content, picture, tar_bytes
from tests.helpers.tiny_shards import (
    VOCAB_SIZE,
    all_words,
    make_text,
    tiny_data_config,
    tiny_train_config,
    tiny_vision_config,
)

Members = list[tuple[str, Content]]


def texts() -> Members:
    return [(f"{number}.txt", make_text(30, number)) for number in range(20)]


def pictures() -> Members:
    return [
        (f"{number}.{kind}", content)
        for number in range(12)
        for kind, content in (
            ("png", picture(40, 30, "PNG", number)),
            ("json", {"caption": make_text(8, number)}),
        )
    ]


def one_document() -> Members:
    return [
        ("doc.json", {"texts": [make_text(20, 1), None, make_text(9, 2)], "images": [None, "a.webp", None]}),
        ("doc.a.webp", picture(60, 30, "WEBP")),
    ]


@pytest.mark.parametrize(
    ("members", "path"), [(texts(), "x/s.tar"), (pictures(), "x"), (one_document(), "{x,y}/s*.tar")]
)
def test_corpora_of_one_kind_give_whole_batches(members: Members, path: str, tmp_path: Path) -> None:
    (tmp_path / "x").mkdir()
    (tmp_path / "x" / "s.tar").write_bytes(tar_bytes(members))
    train_tokenizer([make_text(400, seed) for seed in range(4)], VOCAB_SIZE, tmp_path / "tokenizer.json")
    data = replace(
        tiny_data_config(tmp_path),
        tokenizer=str(tmp_path / "tokenizer.json"),
        sources={"tars": SourceConfig(format=SourceFormat.webdataset, path=path)},
    )
    index_source("tars", data, str(tmp_path / "tokenizer.json"), 0, lambda done, total, num_bytes: None)

    with DataLoader(data, tiny_train_config(), tiny_vision_config()) as loader:
        for step in (1, 2):
            plan = loader.plan(step)
            batches = list(
                loader.micro_batches(plan, dp_rank=0, dp_size=1, reads=all_words(with_pixels=True))
            )
            assert len(batches) == 4
            assert all(batch.loss_mask.sum() > 0 for batch in batches)
        assert loader.skip_log.num_skipped == 0


def test_an_energon_index_follows_its_splits_and_fields(tmp_path: Path) -> None:
    meta = tmp_path / ".nv-meta"
    meta.mkdir()
    for number in range(3):
        shown = {"caption": make_text(5, number), "other": make_text(9, number)}
        members: Members = [(f"{number}.jpg", picture()), (f"{number}.json", shown)]
        (tmp_path / f"{number}.tar").write_bytes(tar_bytes(members))
    train_tokenizer([make_text(400, seed) for seed in range(4)], VOCAB_SIZE, tmp_path / "tokenizer.json")
    sources = {"tars": SourceConfig(format=SourceFormat.energon, path=".")}
    vocabulary = str(tmp_path / "tokenizer.json")
    data = replace(tiny_data_config(tmp_path), tokenizer=vocabulary, sources=sources)

    def index(train: str, heldout: str, field: str = "caption") -> tuple[dict[str, tuple[int, int]], int]:
        (meta / ".info.json").write_text(json.dumps({"shard_counts": {f"{i}.tar": 1 for i in range(3)}}))
        parts = {
            part: [f"{i}.tar" for i in numbers] for part, numbers in (("train", train), ("val", heldout))
        }
        (meta / "split.yaml").write_text(json.dumps({"split_parts": parts}))
        fields = {"image": "jpg", "caption": f"json[{field}]"}
        kind = {"__module__": "megatron.energon", "__class__": "CaptioningSample"}
        (meta / "dataset.yaml").write_text(json.dumps({"sample_type": kind, "field_map": fields}))
        header = index_source("tars", data, vocabulary, 0, lambda done, total, num_bytes: None)
        assert header is not None, "an index of what .nv-meta said before counts as current"
        return dict(header.splits), header.num_tokens

    splits, num_tokens = index("01", "2")
    assert splits == {"train": (0, 2), "heldout": (2, 3)}
    assert index("0", "12")[0] == {"train": (0, 1), "heldout": (1, 3)}
    assert index("0", "2")[0] == {"train": (0, 1), "heldout": (1, 2)}
    assert index("01", "2", "other")[1] > num_tokens

    (meta / "split.yaml").write_text(json.dumps({"split_parts": {"train": ["0.tar"], "val": ["2.tar"]}}))
    with pytest.raises(StaleIndexError, match=r"\.nv-meta/split\.yaml.*index the source again"):
        open_source("tars", data, load_tokenizer(vocabulary), checks_shards=True)
