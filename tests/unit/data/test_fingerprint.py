"""Facts of the data: equal wherever the set lies and however it is cut into shards, others for other data."""

import hashlib
import json
import re
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from k25_train.data.fingerprint import BATCH_VERSION
from k25_train.data.formats.dataset import MANIFEST
from k25_train.data.loader import DataLoader
from tests.helpers.tiny_shards import (
    all_words,
    make_text,
    tiny_data_config,
    tiny_samples,
    tiny_train_config,
    tiny_vision_config,
    write_shard_set,
)

GOLDEN = Path(__file__).parents[2] / "golden" / "data" / "batches.json"


def open_loader(directory: Path, **data: Any) -> DataLoader:
    return DataLoader(replace(tiny_data_config(directory), **data), tiny_train_config(), tiny_vision_config())


def write_set(directory: Path, samples_per_shard: int = 16) -> Path:
    splits = {"train": tiny_samples(12, seed=0), "heldout": tiny_samples(6, seed=1000)}
    return write_shard_set(directory, splits, samples_per_shard)


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_set(tmp_path_factory.mktemp("tiny") / "set")


def edit_manifest(directory: Path, edit: Callable[[dict[str, Any]], object]) -> None:
    manifest = json.loads((directory / MANIFEST).read_text())
    edit(manifest)
    (directory / MANIFEST).write_text(json.dumps(manifest))


def differing(one: dict[str, str], other: dict[str, str]) -> set[str]:
    return {key for key in one.keys() | other.keys() if one.get(key) != other.get(key)}


def test_facts_do_not_depend_on_the_place_nor_on_the_size_of_shards(tiny: Path, tmp_path: Path) -> None:
    facts = open_loader(tiny).facts()
    moved = Path(shutil.copytree(tiny, tmp_path / "elsewhere"))

    assert open_loader(moved).facts() == facts
    assert open_loader(write_set(tmp_path / "small shards", samples_per_shard=5)).facts() == facts
    assert facts["data.train.caption"].startswith("12 samples, ")
    assert set(facts) >= {"data.heldout.video", "data.tokenizer", "data.packing"}


OTHER_DATA: dict[str, tuple[Callable[[dict[str, Any]], object], set[str]]] = {
    "a shard less": (lambda manifest: manifest["splits"]["train"].pop(), {"data.train"}),
    "a shard twice": (
        lambda manifest: manifest["splits"]["train"].append(manifest["splits"]["train"][0]),
        {"data.train"},
    ),
    "another order": (lambda manifest: manifest["splits"]["train"].reverse(), {"data.train"}),
    "splits exchanged": (
        lambda manifest: manifest.update(
            splits={
                "train": manifest["splits"]["heldout"],
                "heldout": manifest["splits"]["train"],
            }
        ),
        {"data.train", "data.heldout"},
    ),
}


@pytest.mark.parametrize(("edit", "changed"), OTHER_DATA.values(), ids=OTHER_DATA.keys())
def test_other_data_have_other_facts(
    tiny: Path, tmp_path: Path, edit: Callable[[dict[str, Any]], object], changed: set[str]
) -> None:
    other = Path(shutil.copytree(tiny, tmp_path / "set"))
    edit_manifest(other, edit)

    keys = differing(open_loader(tiny).facts(), open_loader(other).facts())

    kinds = ("text", "caption", "ocr", "video")
    assert keys == {
        f"{split}.{kind}{what}" for split in changed for kind in kinds for what in ("", ".content")
    }


def test_one_sample_of_another_length_changes_its_kind_alone(tiny: Path, tmp_path: Path) -> None:
    samples = tiny_samples(12, seed=0)
    samples[0] = replace(samples[0], parts=[make_text(30, 99)])
    other = write_shard_set(tmp_path / "set", {"train": samples, "heldout": tiny_samples(6, seed=1000)})

    keys = differing(open_loader(tiny).facts(), open_loader(other).facts())
    assert keys == {"data.train.text", "data.train.text.content"}


@pytest.mark.parametrize(("kind", "of_media"), [("text", False), ("caption", True), ("video", True)])
def test_other_words_or_pixels_of_the_same_size_change_the_content_alone(
    tiny: Path, tmp_path: Path, kind: str, of_media: bool
) -> None:
    other = Path(shutil.copytree(tiny, tmp_path / "set"))
    index = other / "train-00000.index.jsonl"
    first, *lines = index.read_text(encoding="utf-8").splitlines()
    records = [json.loads(line) for line in lines]
    record = next(record for record in records if record["kind"] == kind)
    described = next(part for part in record["segments"] if part["type"] != "text") if of_media else record
    described["crc32"] = "00000000"
    index.write_text("\n".join([first, *map(json.dumps, records)]) + "\n", encoding="utf-8")

    keys = differing(open_loader(tiny).facts(), open_loader(other).facts())

    assert keys == {f"data.train.{kind}.content"}


def test_a_set_without_checksums_says_nothing_of_its_content(tiny: Path, tmp_path: Path) -> None:
    older = Path(shutil.copytree(tiny, tmp_path / "set"))
    for index in older.glob("*.index.jsonl"):
        text = index.read_text(encoding="utf-8")
        index.write_text(re.sub(r'"crc32": "[0-9a-f]{8}"', '"crc32": ""', text), encoding="utf-8")

    facts, of_older = open_loader(tiny).facts(), open_loader(older).facts()

    assert differing(facts, of_older) == {key for key in facts if key.endswith(".content")}
    assert of_older.items() < facts.items()


def test_samples_behind_the_limit_do_not_count(tiny: Path, tmp_path: Path) -> None:
    samples = tiny_samples(12, seed=0)
    fewer = write_shard_set(tmp_path / "set", {"train": samples[:20], "heldout": tiny_samples(6, seed=1000)})

    assert open_loader(fewer, limit_samples=5).facts() == open_loader(tiny, limit_samples=5).facts()
    assert open_loader(fewer).facts() != open_loader(tiny).facts()


def test_batches_of_a_fixed_set_change_only_with_the_version(tiny: Path) -> None:
    digest = hashlib.sha256()
    with open_loader(tiny) as loader:
        plans = [loader.plan(step) for step in (0, 1, 7, 40)] + [loader.plan_evaluation(8)]
        for plan in plans:
            for batch in loader.micro_batches(plan, dp_rank=0, dp_size=1, reads=all_words(with_pixels=False)):
                for tensor in (batch.tokens, batch.labels, batch.loss_mask, batch.source != 0):
                    digest.update(tensor.numpy().tobytes())
                digest.update(repr((batch.document_lengths, batch.item_documents)).encode())
            digest.update(
                repr([(*item.grid_thw, item.frames, item.timestamp_s) for item in plan.items]).encode()
            )

    golden = json.loads(GOLDEN.read_text())

    assert golden.get(str(BATCH_VERSION)) == digest.hexdigest(), (
        f"the batches of a fixed set are not those of BATCH_VERSION={BATCH_VERSION}. If that is intended, no "
        f"run may resume in silence: raise it in fingerprint.py and add its line to {GOLDEN.name}: "
        f'"{digest.hexdigest()}"'
    )
