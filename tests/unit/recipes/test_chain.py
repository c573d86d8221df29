"""Chains: what their files say, and what is refused before anything runs."""

from dataclasses import replace
from pathlib import Path

import pytest
import yaml

from k25_train.errors import ConfigError
from k25_train.recipes.chain import Chain, Stage, chain_names, load_chain
from k25_train.recipes.composed import check_runnable, compose_chain
from k25_train.recipes.stages import commands, main, to_fill_in
from k25_train.recipes.vision_ratio import INJECTIONS, chain_of
from tests.helpers.in_process import status_of_command

LM = {"experiment": "smoke_lm"}
VIT = {
    "experiment": "smoke_vit",
    "parts": {"language_model": "lm"},
    "fresh": ["vision_tower.*", "mm_projector.*"],
}


def written(folder: Path, stages: dict[str, object], **more: object) -> str:
    """A chain file."""
    path = folder / "mine.yaml"
    path.write_text(yaml.safe_dump({"dir": str(folder / "runs"), "stages": stages, **more}, sort_keys=False))
    return str(path)


@pytest.mark.parametrize("name", chain_names())
def test_chains_of_the_project_compose(name: str) -> None:
    stages = compose_chain(load_chain(name))
    assert [each.stage.name for each in stages] == [each.name for each in load_chain(name).stages]


def test_a_stage_starts_from_the_last_checkpoints_of_those_before() -> None:
    stages = {each.stage.name: each for each in compose_chain(load_chain("smoke", ["dir=here/chain"]))}
    projector = stages["projector"].config.checkpoint
    assert projector.init_from is None
    assert projector.init_parts == {
        "language_model": f"here/chain/base/checkpoints/step_{stages['base'].config.train.steps}",
        "vision_tower": f"here/chain/vit/checkpoints/step_{stages['vit'].config.train.steps}",
    }
    assert stages["midtrain_4k"].config.checkpoint.init_from == stages["midtrain_1k"].last_checkpoint


def test_what_is_trained_and_how_far_the_context_is_stretched() -> None:
    stages = {each.stage.name: each.config for each in compose_chain(load_chain("smoke"))}
    trained = {
        name: [
            part.trained
            for part in (config.optim.language_model, config.optim.vision_tower, config.optim.mm_projector)
        ]
        for name, config in stages.items()
    }
    assert trained["vit"] == [False, True, True]
    assert trained["projector"] == [False, False, True]
    assert trained["joint"] == trained["midtrain_4k"] == [True, True, True]
    assert stages["vit"].model.hidden_size < stages["projector"].model.hidden_size
    for name in ("joint", "midtrain_1k", "midtrain_4k"):
        rope = stages[name].model.rope
        assert stages[name].train.seq_len == rope.original_max_position * rope.scaling_factor
    assert not stages["joint"].data.schedule, "the ratio is constant"


@pytest.mark.parametrize(
    ("stages", "expected"),
    [
        ({"lm": {**LM, "start": "base"}}, "is none of the stages before it"),
        ({"lm": {**LM, "start": "vit"}, "vit": VIT}, "comes later"),
        ({"lm": {**LM, "start": "lm"}}, "is the stage itself"),
        ({"lm": {**LM, "begin": "x"}}, "stages.lm.begin"),
        ({"lm": {"start": "runs/x"}}, "stages.lm.experiment"),
        ({"lm": "smoke_lm"}, "must be a mapping"),
        ({"lm": {**LM, "parts": {"head": "runs/x"}}}, "stages.lm.parts.head"),
        ({}, "must name at least one"),
    ],
)
def test_files_that_make_no_sense(tmp_path: Path, stages: dict[str, object], expected: str) -> None:
    with pytest.raises(ConfigError, match=expected):
        load_chain(written(tmp_path, stages))


@pytest.mark.parametrize(
    ("stages", "expected"),
    [
        ({"lm": {"experiment": "smoke_llm"}}, "is not a choice of experiment"),
        ({"lm": {**LM, "overrides": {"train.steps": 3}}}, "stage lm: .*\n.*train.steps"),
        ({"lm": LM, "vit": {**VIT, "fresh": ["vision_tower.*"]}}, "of mm_projector have no source"),
        (
            {"lm": LM, "wide": {**VIT, "experiment": "smoke_projector"}},
            "starts from lm, which trains another model",
        ),
        (
            {"lm": LM, "vit": VIT, "next": {"experiment": "smoke_projector", "start": "vit", "parts": {}}},
            "model.hidden_size=96 in stage vit, 128 now",
        ),
    ],
)
def test_stages_that_do_not_fit(tmp_path: Path, stages: dict[str, object], expected: str) -> None:
    with pytest.raises(ConfigError, match=expected):
        compose_chain(load_chain(written(tmp_path, stages)))


def test_a_projector_of_another_width_is_not_taken(tmp_path: Path) -> None:
    wide = {"experiment": "smoke_projector", "parts": {"mm_projector": "vit", "vision_tower": "vit"}}
    chain = {"lm": LM, "vit": VIT, "wide": {**wide, "fresh": ["language_model.*"]}}
    with pytest.raises(ConfigError, match=r"model.hidden_size=96 in stage vit"):
        compose_chain(load_chain(written(tmp_path, chain)))


def test_all_that_is_wrong_is_told_at_once(tmp_path: Path) -> None:
    chain = {
        "lm": {"experiment": "smoke_llm"},
        "vit": {**VIT, "overrides": {"train.seed": "x"}},
        "b": {"experiment": "?"},
    }
    with pytest.raises(ConfigError) as error:
        compose_chain(load_chain(written(tmp_path, chain)))
    assert "stage lm" in str(error.value) and "stage b" in str(error.value)
    # It starts from a stage that does not compose.
    assert "stage vit" not in str(error.value)


@pytest.mark.parametrize("setting", ["train.steps=3", "nobody.train.steps=3", "lm", "dir="])
def test_settings_of_no_stage(tmp_path: Path, setting: str) -> None:
    with pytest.raises(ConfigError, match="is no setting of a stage"):
        load_chain(written(tmp_path, {"lm": LM}), [setting])


def test_settings_of_a_stage_come_last(tmp_path: Path) -> None:
    path = written(tmp_path, {"lm": {**LM, "overrides": {"train.seed": 5}}})
    (stage,) = compose_chain(load_chain(path, ["lm.train.seed=7", f"dir={tmp_path / 'there'}"]))
    assert stage.config.train.seed == 7
    assert stage.config.run.dir == str(tmp_path / "there" / "lm")


def test_a_stage_has_the_tokens_of_its_ramp(tmp_path: Path) -> None:
    ramp = {"train.batch_ramp.start": 8, "train.batch_ramp.increment": 8, "train.batch_ramp.length": 10}
    batches = {"train.global_batch_size": 16, **ramp}
    (stage,) = compose_chain(load_chain(written(tmp_path, {"lm": {**LM, "overrides": batches}})))
    train = stage.config.train
    sizes = [train.batches.size_of(step) for step in range(1, train.steps + 1)]
    assert sizes[0] == 8 < sizes[-1] == train.global_batch_size
    assert stage.num_tokens == sum(sizes) * train.seq_len


def test_needles_behind_a_stage_that_there_is_not(tmp_path: Path) -> None:
    needles = {"data": "x", "after": ["vit"], "lengths": [1024]}
    with pytest.raises(ConfigError, match=r"needles.after=vit"):
        load_chain(written(tmp_path, {"lm": LM}, needles=needles))
    with pytest.raises(ConfigError, match=r"needles.lengths=long"):
        load_chain(written(tmp_path, {"lm": LM}, needles={**needles, "after": ["lm"], "lengths": ["long"]}))


def test_unknown_chains_are_refused() -> None:
    with pytest.raises(ConfigError, match=r"use one of .*smoke"):
        load_chain("smok")


def test_templates_have_to_be_completed(tmp_path: Path) -> None:
    stages = {"lm": {**LM, "start": "<an import>"}, "vit": {**VIT, "parts": {"language_model": "lm"}}}
    chain = load_chain(written(tmp_path, stages))
    composed = compose_chain(chain)
    with pytest.raises(ConfigError, match=r"checkpoint\.init_from=<an import>\s+has to be filled in"):
        check_runnable(composed)
    check_runnable(composed[1:])
    check_runnable(compose_chain(load_chain(written(tmp_path, stages), ["lm.checkpoint.init_from=runs/x"])))


def test_commands_tell_what_has_to_be_filled_in(capsys: pytest.CaptureFixture[str]) -> None:
    """As comments, so that what is printed is a script still."""
    assert status_of_command(main, "chain=k25", "--commands") == 0
    told, *_ = lines = capsys.readouterr().out.splitlines()
    key = "checkpoint.init_parts.language_model"
    assert told == f"# vit: {key}=<import of Moonlight-16B-A3B> has to be filled in"
    assert sum(line.startswith("python -m launch.slurm") for line in lines) == len(load_chain("k25").stages)
    assert to_fill_in(compose_chain(load_chain("smoke"))) == []


def test_commands_submit_each_stage() -> None:
    lines = commands(compose_chain(load_chain("smoke")))
    assert len(lines) == len(load_chain("smoke").stages)
    assert lines[-1].startswith("python -m launch.slurm experiment=smoke_midtrain_4k ")
    assert "checkpoint.init_from=runs/stages/midtrain_1k/checkpoints/step_" in lines[-1]


def test_the_command_prints_them(capsys: pytest.CaptureFixture[str]) -> None:
    assert status_of_command(main, "chain=smoke", "--commands") == 0
    assert capsys.readouterr().out.count("python -m launch.slurm") == len(load_chain("smoke").stages)


def test_runs_of_the_ablation_have_one_budget() -> None:
    assert {round((1 - each.start) * each.ratio, 9) for each in INJECTIONS} == {0.1}
    stages = compose_chain(chain_of("runs/x", ["train.steps=100", "optim.decay=10"]))
    early, mid, late = (each.config for each in stages)
    assert early.data.vision_ratio == 0.1 and not early.data.schedule
    assert [each.data.schedule["images"].from_step for each in (mid, late)] == [51, 81]
    assert [each.data.schedule["images"].vision_ratio for each in (mid, late)] == [0.2, 0.5]
    assert len({(each.num_tokens, each.config.train.seed) for each in stages}) == 1


def test_one_chain_may_be_changed_in_code() -> None:
    chain = Chain(name="x", dir="runs/x", stages=(Stage(name="lm", experiment="smoke_lm"),))
    (stage,) = compose_chain(replace(chain, dir="runs/y/"))
    assert stage.config.run.dir == "runs/y/lm"


def test_the_command_explains_a_chain(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    picture = tmp_path / "chain.png"
    assert status_of_command(main, "chain=smoke", "--explain", "--png", picture) == 0
    printed = capsys.readouterr().out
    assert all(stage.name in printed for stage in load_chain("smoke").stages)
    assert picture.stat().st_size > 10_000
    assert status_of_command(main, "--png", picture) == 2
    assert "--png: is for --explain" in capsys.readouterr().err
