"""What may change between a checkpoint and the run that goes on from it, and what may not."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import yaml

from k25_train.checkpoint.continuity import (
    MAY_CHANGE,
    SAME_MODEL,
    SAME_RUN,
    changed_facts,
    check_continuity,
    check_facts,
    covers,
)
from k25_train.compose.migrations import VERSION_KEY
from k25_train.compose.resolve import compose, to_yaml
from k25_train.config.leaves import leaves
from k25_train.errors import CheckpointError, ConfigError

BASE = (
    "experiment=smoke train.seed=7 train.seq_len=256 train.dtype=float32 data.shuffle=true "
    "data.limit_samples=null optim.vision_tower.trained=false model.num_layers=5 model.vision.video_fps=2.0"
).split()


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("run") / "step_10"
    folder.mkdir()
    (folder / "config.yaml").write_text(to_yaml(compose(BASE)))
    return folder


@pytest.mark.parametrize(
    ("override", "told"),
    [
        ("train.seed=8", "train.seed=7 in the checkpoint, 8 now"),
        ("train.seq_len=128", "train.seq_len=256 in the checkpoint, 128 now"),
        ("train.dtype=bfloat16", "train.dtype=float32 in the checkpoint, bfloat16 now"),
        ("data.shuffle=false", "data.shuffle=True in the checkpoint, False now"),
        ("data.limit_samples=5", "data.limit_samples=None in the checkpoint, 5 now"),
        ("optim.mm_projector.trained=false", "optim.mm_projector.trained=True in the checkpoint, False now"),
        ("optim.vision_tower.trained=true", "optim.vision_tower.trained=False in the checkpoint, True now"),
        ("model.num_layers=4", "model.num_layers=5 in the checkpoint, 4 now"),
        ("model.vision.video_fps=1", "model.vision.video_fps=2.0 in the checkpoint, 1.0 now"),
    ],
)
def test_a_contradiction_is_named_with_both_values(checkpoint: Path, override: str, told: str) -> None:
    with pytest.raises(CheckpointError) as raised:
        check_continuity(checkpoint, compose([*BASE, override]), SAME_RUN)

    lines = str(raised.value).splitlines()
    assert lines[0] == f"{checkpoint} was trained with another configuration:"
    assert lines[1:-1] == [f"  {told}"]
    assert "another run.dir" in lines[-1]


def test_all_contradictions_stand_together(checkpoint: Path) -> None:
    kinds = ["data.sources.text.kinds=[text, ocr]", "data.sources.video.format=webdataset"]
    kinds.append("data.sources.video.kinds=[]")
    now = compose([*BASE, *kinds, "train.global_batch_size=32", "model.hidden_size=64"])

    with pytest.raises(CheckpointError) as raised:
        check_continuity(checkpoint, now, SAME_RUN)

    sources = ("data.sources.text.kinds", "data.sources.video.format", "data.sources.video.kinds")
    for key in (*sources, "train.global_batch_size", "model.hidden_size"):
        assert f"  {key}=" in str(raised.value)


@pytest.mark.parametrize(
    "override",
    [
        "parallelism.pp=1 parallelism.vpp=1 parallelism.ep=1 cluster.gpus_per_node=1",
        "optim.lr=1e-4 optim.min_lr=1e-5 optim.weight_decay=0.3",
        "train.steps=1000 train.eval_interval=7 train.micro_batch_size=1",
        "checkpoint.interval=3 checkpoint.keep=9",
        "data.prefetch_steps=0 data.max_skipped_samples=3 data.dir=elsewhere",
        "data.sources.text.path=elsewhere data.sources.text.weight=0.3 data.sources.ocr.epochs=2",
        "~data.sources.ocr data.sources.web={format: indexed, path: web} data.vision_ratio=0.2",
        "data.schedule={late: {from_step: 9, weights: {text: 0.1}}}",
    ],
)
def test_what_may_change_on_the_way(checkpoint: Path, override: str) -> None:
    check_continuity(checkpoint, compose([*BASE, *re.split(r" (?=~?[a-z]+\.)", override)]), SAME_RUN)


def test_weights_alone_ask_for_the_same_model_only(checkpoint: Path) -> None:
    check_continuity(checkpoint, compose([*BASE, "train.seed=8"]), SAME_MODEL)
    with pytest.raises(CheckpointError, match=r"model\.init_std"):
        check_continuity(checkpoint, compose([*BASE, "model.init_std=0.1"]), SAME_MODEL)


def test_a_key_of_a_later_version_does_not_contradict(checkpoint: Path, tmp_path: Path) -> None:
    config = compose(BASE)
    lines = (checkpoint / "config.yaml").read_text().splitlines()
    (tmp_path / "config.yaml").write_text("\n".join(line for line in lines if "num_layers" not in line))

    check_continuity(tmp_path, config, SAME_RUN)


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ("", "is not a configuration but empty"),
        ("- a\n", "is not a configuration but a list"),
        ("model: !!python/name:os.system\n", "the tag"),
        ("model: 2024-13-45\n", "month must be in 1..12"),
        ("config_version: seven\n", "must be a version that this code knows"),
        ("cluster: 7\n", "cannot be read as a configuration"),
        ("model: {\n", "cannot be read as a configuration"),
    ],
)
def test_a_configuration_that_is_none_is_named(text: str, told: str, tmp_path: Path) -> None:
    """That of a checkpoint without checksums may be anything."""
    (tmp_path / "config.yaml").write_text(text)
    with pytest.raises(ConfigError) as raised:
        check_continuity(tmp_path, compose(BASE), SAME_RUN)
    assert str(raised.value).startswith(f"{tmp_path}/config.yaml: ")
    assert told in str(raised.value)


def test_every_key_is_fixed_or_may_change_for_a_reason() -> None:
    """A new key has to be put into one of the two lists."""
    late = "data.schedule={late: {from_step: 9, weights: {text: 0.1}}}"
    reinforced = ("algorithm=k25", "rollout=in_process", "environment=sums")
    keys = {
        key
        for more in ((), reinforced)
        for key, _ in leaves(yaml.safe_load(to_yaml(compose([*BASE, late, *more]))))
        # Sections that a run without reinforcement learning does not have.
        if key not in (VERSION_KEY, "algorithm", "rollout", "environment")
    }
    free = [name for names in MAY_CHANGE.values() for name in names]
    places = {key: [name for name in (*SAME_RUN, *free) if covers(name, key)] for key in sorted(keys)}
    assert {key: names for key, names in places.items() if len(names) != 1} == {}
    assert {*SAME_RUN, *free} == {name for names in places.values() for name in names}


FACTS = {"data.train.text": "7 samples", "data.train.ocr": "3 samples", "data.tokenizer": "sha256 a"}


@pytest.mark.parametrize(
    ("now", "told"),
    [
        (
            {**FACTS, "data.train.text": "6 samples"},
            "data.train.text: 7 samples in the checkpoint, 6 samples now",
        ),
        ({**FACTS, "data.tokenizer": "sha256 b"}, "data.tokenizer: sha256 a in the checkpoint, sha256 b now"),
        (
            {**FACTS, "data.train.text.content": "1"},
            "data.train.text.content: nothing in the checkpoint, 1 now",
        ),
        (
            {"data.train.text": "7 samples", "data.train.ocr": "3 samples"},
            "data.tokenizer: sha256 a in the checkpoint, nothing now",
        ),
    ],
)
def test_other_data_are_told_fact_by_fact_and_accepted_on_request(
    now: dict[str, str], told: str, tmp_path: Path
) -> None:
    with pytest.raises(CheckpointError) as raised:
        check_facts(tmp_path, FACTS, now)
    first, difference, *remedy = str(raised.value).splitlines()
    assert first == f"{tmp_path} was trained on other data:"
    assert difference.startswith(f"  {told}")
    assert "checkpoint.accept_changed_data=true" in " ".join(remedy)

    check_facts(tmp_path, FACTS, now, accept=True)
    check_facts(tmp_path, FACTS, FACTS)
    check_facts(tmp_path, {}, now)


def test_sources_that_come_and_go_are_no_other_data(tmp_path: Path) -> None:
    without_ocr = {"data.tokenizer": "sha256 a", "data.train.text": "7 samples"}
    with_video = {**FACTS, "data.train.video": "1 sample", "data.heldout.video.content": "sha256 c"}
    for now in (without_ocr, with_video, {**without_ocr, "data.train.video": "1 sample"}):
        check_facts(tmp_path, FACTS, now)
        check_facts(tmp_path, now, FACTS)
    changed = changed_facts(FACTS, {**with_video, "data.train.text": "8 samples"})
    assert changed == ["  data.train.text: 7 samples in the checkpoint, 8 samples now"]


def test_a_name_covers_what_lies_in_it() -> None:
    assert covers("data.sources.*.weight", "data.sources.web.weight")
    assert covers("data", "data.sources.web.weight") and covers("data.dir", "data.dir")
    assert not covers("data.sources.*.weight", "data.sources.web.epochs")
    assert not covers("data.di", "data.dir") and not covers("data.dir.more", "data.dir")
