"""A chain of stages by the tokens of all of them, in numbers, words and a picture."""

from pathlib import Path

import pytest
from PIL import Image

from k25_train.compose.resolve import compose
from k25_train.config.parts import ModelPart
from k25_train.config.schema import Config
from k25_train.plan.stage_schedule import StageCurve, chain_curves
from k25_train.recipes.explain import draw, explain, in_words

SIZES = ("experiment=smoke", "train.seq_len=250", "train.global_batch_size=16", "train.eval_sequences=16")


@pytest.fixture(scope="module")
def stages() -> list[tuple[str, Config]]:
    vision = ("optim.language_model.trained=false", "data.vision_ratio=0.5")
    ramp = tuple(f"train.batch_ramp.{key}={value}" for key, value in (("start", 8), ("increment", 4)))
    schedule = "data.schedule={late: {from_step: 60, vision_ratio: 0.25}}"
    joint = ("train.steps=100", "optim.vision_tower.lr_scale=0.5", "optim.frozen_expert_bias=10", schedule)
    return [
        ("tower", compose([*SIZES, *vision, "train.steps=80"])),
        ("joint", compose([*SIZES, *joint, *ramp, "train.batch_ramp.length=40", "data.vision_ratio=0.1"])),
        ("long", compose([*SIZES, "train.steps=70", "train.seq_len=500", "data.vision_ratio=null"])),
    ]


@pytest.fixture(scope="module")
def curves(stages: list[tuple[str, Config]]) -> tuple[StageCurve, ...]:
    return chain_curves(stages)


def test_stages_follow_one_another(curves: tuple[StageCurve, ...]) -> None:
    of_joint = 20 * 8 * 250 + 20 * 12 * 250 + 60 * 16 * 250
    assert [curve.tokens for curve in curves] == [80 * 4000, of_joint, 70 * 8000]
    assert [curve.start for curve in curves] == [0, 320_000, 320_000 + of_joint]
    for curve in curves:
        steps = [point.step for point in curve.points]
        assert steps == sorted(set(steps))
        assert steps[0] == 1
        assert steps[-1] == curve.config.train.steps
        assert [point.tokens for point in curve.points] == sorted(point.tokens for point in curve.points)


def test_every_change_is_seen_where_it_is(curves: tuple[StageCurve, ...]) -> None:
    tower, joint, _ = curves
    assert set(tower.points[0].rates) == {ModelPart.vision_tower, ModelPart.mm_projector}
    at = {point.step: point for point in joint.points}
    assert [at[step].batch_tokens for step in (20, 21, 40, 41)] == [2000, 3000, 3000, 4000]
    assert [at[step].vision_ratio for step in (59, 60)] == [0.1, 0.25]
    assert [at[step].moves_expert_bias for step in (90, 91)] == [True, False]
    peak = at[10].rates
    assert peak[ModelPart.vision_tower] == 0.5 * peak[ModelPart.language_model]
    assert max(point.rates[ModelPart.language_model] for point in joint.points) == joint.config.optim.lr
    assert not any(point.moves_expert_bias for point in tower.points)


def test_the_table_has_what_a_stage_is(stages: list[tuple[str, Config]]) -> None:
    text = explain(stages, 200)
    of_joint = "".join(line for line in text.splitlines() if "joint" in line)
    for words in ("340K", "660K", "100", "250", "2K → 4K", "10% → 25%", "tower x0.5", "biases stay"):
        assert words in of_joint, words
    assert " 40% " in "".join(line for line in text.splitlines() if "long" in line)
    narrow = explain(stages, 90)
    assert max(map(len, narrow.splitlines())) <= 90
    assert "sequence" in narrow


def test_the_picture_has_every_stage(stages: list[tuple[str, Config]], tmp_path: Path) -> None:
    path = tmp_path / "chain.png"
    draw(stages, path)
    with Image.open(path) as picture:
        assert picture.width >= 1000
        assert len(picture.getcolors(1 << 24) or []) > 100
    draw(stages[:1], path)


@pytest.mark.parametrize(
    ("tokens", "words"), [(15_500_000_000_000, "15.5T"), (67_108_864, "67.1M"), (999, "999"), (999_999, "1M")]
)
def test_tokens_are_told_in_three_digits(tokens: int, words: str) -> None:
    assert in_words(tokens) == words
