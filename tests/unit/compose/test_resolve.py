"""From overrides to typed sections: what is accepted, what is refused, and what the refusal says."""

import re
from dataclasses import is_dataclass, replace
from functools import partial
from pathlib import Path

import pytest
import yaml
from omegaconf import OmegaConf

from k25_train.compose.filled import check_filled_in, check_weights_filled_in
from k25_train.compose.resolve import CONF_DIR, compose, group_choices, load, resolve, to_yaml
from k25_train.config.basics import DType
from k25_train.config.cluster import Device
from k25_train.config.leaves import leaves
from k25_train.config.optimizer import OptimName
from k25_train.config.parts import ModelPart
from k25_train.config.schema import Config
from k25_train.errors import ConfigError
from k25_train.train import check_start
from parallel.config import DepMode
from tests.helpers.project_sources import REPO
from tests.helpers.smoke_mix import mix

EXPERIMENTS = sorted(path.stem for path in (CONF_DIR / "experiment").glob("*.yaml"))


def refusal(*overrides: str) -> str:
    """The text with which the smoke experiment under these overrides is refused."""
    with pytest.raises(ConfigError) as caught:
        compose(["experiment=smoke", *overrides])
    return str(caught.value)


@pytest.mark.parametrize("experiment", EXPERIMENTS)
def test_every_experiment_resolves(experiment: str) -> None:
    config = compose([f"experiment={experiment}"])
    assert config.run.dir == f"runs/{experiment}"


@pytest.mark.parametrize("group", sorted(set(group_choices()) - {"experiment"}))
def test_every_group_file_is_chosen_or_offered(group: str) -> None:
    used = "\n".join(path.read_text() for path in CONF_DIR.rglob("*.yaml"))
    readme = (REPO / "README.md").read_text()
    for choice in group_choices()[group]:
        # By an experiment, or as what another file of its group is built on; else by the README.
        chosen = re.search(rf"^ +- (.*{group}: )?{choice}$|^rates: {choice}$", used, re.MULTILINE)
        assert chosen or f"`{group}={choice}`" in readme, f"conf/{group}/{choice}.yaml"


def test_every_yaml_says_where_its_numbers_come_from() -> None:
    for path in CONF_DIR.rglob("*.yaml"):
        comments = [line for line in path.read_text().splitlines()[:2] if line.startswith("# ")]
        source = comments[-1].removeprefix("# ")
        assert len(source) > 20, path
        assert not source.startswith("@package"), path


OF_A_STAGE = {
    "cluster.nodes",
    "optim.language_model.trained",
    "optim.vision_tower.trained",
    "optim.mm_projector.trained",
}
"""What a stage says of itself, whatever cluster and optimizer are chosen."""


@pytest.mark.parametrize("experiment", EXPERIMENTS)
def test_choosing_a_group_is_never_undone_by_the_experiment(experiment: str) -> None:
    """Where an experiment set a group's keys, `GROUP=CHOICE` on the command line would do nothing."""
    body = yaml.safe_load((CONF_DIR / "experiment" / f"{experiment}.yaml").read_text())
    # Pre-training at 4k leaves out the stretched context that is part of the released model.
    body.get("model", {}).pop("rope", None)
    own = {key for key, _ in leaves(body)} - OF_A_STAGE
    for group, choices in group_choices().items():
        for choice in choices if group != "experiment" else []:
            of_group = yaml.safe_load((CONF_DIR / group / f"{choice}.yaml").read_text())
            assert not own & {f"{group}.{key}" for key, _ in leaves(of_group)}, f"conf/{group}/{choice}.yaml"


def test_a_group_can_be_chosen_over_the_experiments() -> None:
    config = compose(["experiment=smoke", "parallelism=serial", "cluster=local_gpu"])
    assert (config.parallelism.pp, config.parallelism.ep, config.world_size) == (1, 1, 1)


def test_sections_are_plain_typed_objects() -> None:
    config = compose(["experiment=smoke"])
    assert is_dataclass(config.model.rope)
    assert type(config.train.steps) is int
    assert type(config.data.sources) is dict
    assert config.train.dtype is DType.float32
    assert config.cluster.device is Device.cpu
    assert config.dep.mode is DepMode.decoupled


def test_phantom_fields_cannot_be_set() -> None:
    with pytest.raises(AttributeError):
        compose(["experiment=smoke"]).train.stpes = 3  # type: ignore[attr-defined]


def test_overrides_win_over_the_experiment() -> None:
    config = compose(["experiment=smoke", "train.seed=7", "data.limit_samples=5", "+data.tokenizer=a/b.json"])
    assert (config.train.seed, config.data.limit_samples, config.data.tokenizer) == (7, 5, "a/b.json")


def test_sources_can_be_taken_away() -> None:
    sources = compose(["experiment=smoke", *mix(text=0.5, caption=0.25)]).data.sources
    assert {name: source.weight for name, source in sources.items()} == {"text": 0.5, "caption": 0.25}


def test_the_choice_of_a_group_may_be_a_file_of_the_user_s(tmp_path: Path) -> None:
    path = tmp_path / "mine.yaml"
    path.write_text("dir: /corpora\nsources:\n  web: {format: indexed, path: web/en}\nvision_ratio: 0.25\n")
    data = compose(["experiment=smoke", f"data={path}", "data.sources.web.weight=3"]).data
    assert (data.dir, data.vision_ratio, list(data.sources)) == ("/corpora", 0.25, ["web"])
    assert data.sources["web"].weight == 3
    assert data.prefetch_steps == compose(["experiment=smoke"]).data.prefetch_steps
    assert data.paths() == {"data.sources.web.path": "/corpora/web/en"}
    assert data.folders() == ["/corpora/web"]
    with pytest.raises(ConfigError, match=r"no_such\.yaml"):
        compose(["experiment=smoke", "data=no_such.yaml"])


def test_a_template_composes_but_does_not_run() -> None:
    config = compose(["experiment=k25_pretrain_4k"])
    with pytest.raises(ConfigError, match=r"5 problems in the data set, which is a template") as raised:
        check_filled_in(config.data)
    assert "data=smoke" in str(raised.value)
    check_filled_in(compose(["experiment=k25_pretrain_4k", "data=smoke"]).data)


@pytest.mark.parametrize(
    ("override", "key"),
    [
        ("checkpoint.init_from=<an import>", "checkpoint.init_from"),
        ("checkpoint.init_parts={vision_tower: <an import>}", "checkpoint.init_parts.vision_tower"),
    ],
)
def test_weights_that_are_a_template_do_not_run(override: str, key: str) -> None:
    base = ["experiment=smoke", "checkpoint.init_fresh=['*']"]
    config = compose([*base, override])
    for check in (partial(check_weights_filled_in, config.checkpoint), partial(check_start, config)):
        with pytest.raises(ConfigError, match="1 problem in the weights to start from") as raised:
            check()
        for text in (f"{key}=<an import>", "has to be filled in", "-> name a checkpoint or an import"):
            assert text in str(raised.value)
    check_weights_filled_in(compose([*base, "checkpoint.init_from=runs/x"]).checkpoint)


def test_a_layout_is_read_from_the_command_line() -> None:
    config = compose(["experiment=smoke", "parallelism.layout='Et|t|t|ttL'"])
    assert config.parallelism.layout == "Et|t|t|ttL"


@pytest.mark.parametrize("override", ["foo=1", "+foo=1", "++foo=1", "foo={bar: 1}"])
def test_unknown_section(override: str) -> None:
    text = refusal(override)
    assert "is not a key of the configuration" in text
    assert "known keys: model, parallelism," in text


@pytest.mark.parametrize("override", ["train.stpes=3", "+train.stpes=3", "train={stpes: 3}"])
def test_unknown_key_names_the_closest(override: str) -> None:
    text = refusal(override)
    assert "train.stpes=3\n      is not a key of train" in text
    assert "did you mean steps? known keys: steps, seq_len" in text


def test_unknown_key_of_a_sub_section() -> None:
    assert "model.vision.patchsize=3\n      is not a key of model.vision" in refusal(
        "model.vision.patchsize=3"
    )


@pytest.mark.parametrize(
    ("override", "shown", "rule"),
    [
        ("train.steps=abc", "train.steps=abc", "must be a whole number"),
        ("train.steps=3.5", "train.steps=3.5", "must be a whole number"),
        ("train.steps=null", "train.steps", "must be a whole number"),
        ("train.steps=[1]", "train.steps=[1]", "must be a whole number"),
        ("train.steps.x=1", "train.steps={'x': '1'}", "must be a whole number"),
        ("optim.lr=fast", "optim.lr=fast", "must be a finite number"),
        ("optim.lr=nan", "optim.lr=nan", "must be a finite number"),
        ("data.sources.text.weight=inf", "data.sources.text.weight=inf", "must be a finite number"),
        ("data.limit_samples=all", "data.limit_samples=all", "must be a whole number or null"),
        ("data.shuffle=perhaps", "data.shuffle=perhaps", "must be true or false"),
        ("train.dtype=fp8", "train.dtype=fp8", "must be one of float32, bfloat16"),
        ("cluster.device=tpu", "cluster.device=tpu", "must be one of cpu, cuda"),
        ("train=3", "train=3", "is a section, not a value"),
        ("~train.steps", "train.steps", "must be given"),
        ("~run", "run.dir", "must be given"),
        ("train.steps=???", "train.steps", "must be given"),
    ],
)
def test_wrong_or_missing_value(override: str, shown: str, rule: str) -> None:
    text = refusal(override)
    assert f"  {shown}" in text
    assert f"\n      {rule}" in text
    assert "-> " in text


@pytest.mark.parametrize(
    ("override", "rule"),
    [
        ("train.tokens=500", "must be a positive number of tokens"),
        ("train.tokens=-1B", "must be a positive number of tokens"),
        ("train.seq_len=0", "must be positive"),
        ("train.seq_len=long", "must be a whole number"),
        ("train.eval_sequences=63", "must be even"),
        ("train.batch_ramp={start: 4, increment: 0, length: 9}", "must be positive"),
        ("train.batch_ramp={start: 4, increment: 7, length: 9}", "must divide what the batch grows by"),
        ("train.batch_ramp={start: 4, increment: 4, length: 9X}", "must be a number of steps"),
    ],
)
def test_steps_that_follow_from_tokens_hide_no_other_mistake(override: str, rule: str) -> None:
    answer = refusal("train.steps=null", "train.tokens=300K", override)
    assert answer.startswith("1 problem ")
    assert rule in answer
    assert "train.steps" not in answer


def test_ranks_that_make_no_whole_replicas_are_the_only_problem() -> None:
    answer = refusal("parallelism.cp=3", "train.seq_len=255")
    assert answer.startswith("1 problem ")
    assert "parallelism.cp=3\n" in answer
    assert "use one of 1, 2," in answer


def test_all_failures_stand_in_one_report() -> None:
    text = refusal(
        "foo=1",
        "+train.bar=2",
        "train.steps=abc",
        "~run.dir",
        "optim.eps=-1",
        "parallelism.pp=3",
        "model.rope.theta=0",
    )
    assert text.startswith("7 problems in the configuration\n")
    for key in ("foo=1", "train.bar=2", "train.steps=abc", "run.dir", "optim.eps=-1", "model.rope.theta=0"):
        assert f"\n  {key}" in text
    assert "parallelism.pp=3\n      must divide the 4 ranks" in text


def test_unknown_choices_list_the_known() -> None:
    text = refusal("model=k25_tyni", "cluster=nowhere")
    assert "did you mean k25_tiny? known choices: deepseek_v3, k25_1t, k25_tiny" in text
    assert "cluster=nowhere\n      is not a choice of cluster" in text


def test_experiment_must_be_chosen() -> None:
    with pytest.raises(ConfigError, match=r"(?s)experiment\n.*must be chosen.*k25_pretrain_4k, .*moonlight"):
        compose(["train.steps=3"])


@pytest.mark.parametrize(
    "override", ["train.steps=[1", "train.steps", "train.steps=1,2", "train.steps=${nope}"]
)
def test_unreadable_override(override: str) -> None:
    with pytest.raises(ConfigError):
        compose(["experiment=smoke", override])


def test_values_are_never_rewritten() -> None:
    composed = OmegaConf.create(yaml.safe_load(to_yaml(compose(["experiment=smoke"]))))
    del composed["derived"], composed["config_version"]
    before = OmegaConf.to_container(composed)
    resolve(composed)
    assert OmegaConf.to_container(composed) == before


def test_yaml_holds_derived_sizes_and_reads_back(tmp_path: Path) -> None:
    config = compose(["experiment=smoke"])
    path = tmp_path / "config.yaml"
    path.write_text(to_yaml(config))
    derived = yaml.safe_load(path.read_text())["derived"]
    assert derived["world_size"] == 4
    assert derived["dp"] == 2
    assert derived["layout"] == "Ett|t|tt|L"
    assert derived["expert_dp"] == 1
    assert derived["num_micro_batches"] == config.train.global_batch_size // (
        2 * config.train.micro_batch_size
    )
    assert derived["tokens_per_step"] == config.train.global_batch_size * config.train.seq_len
    assert derived["tokens_total"] == derived["tokens_per_step"] * config.train.steps
    assert derived["parameters_total"] > derived["parameters_active"] > 0
    assert load(path) == (config, [])


def test_a_loaded_configuration_can_be_changed(tmp_path: Path) -> None:
    path = tmp_path / "config.yaml"
    path.write_text(to_yaml(compose(["experiment=smoke"])))
    changed = load(path, ["train.seed=7", "data.tokenizer=a.json", "parallelism.layout=Et|t|t|ttL"]).config
    assert (changed.train.seed, changed.data.tokenizer) == (7, "a.json")
    assert changed.parallelism.layout == "Et|t|t|ttL"


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("train.stpes=3", "did you mean steps"),
        ("foo=1", "is not a key of the configuration"),
        ("train.steps", "write SECTION.KEY=VALUE"),
        ("train.steps=[1", "must be a whole number"),
        ("train.steps.x=1", "must be a whole number|cannot be read"),
        ("optim.lr=-1", "must be positive"),
    ],
)
def test_changes_to_a_loaded_configuration_are_checked(tmp_path: Path, override: str, message: str) -> None:
    path = tmp_path / "config.yaml"
    path.write_text(to_yaml(compose(["experiment=smoke"])))
    with pytest.raises(ConfigError, match=message):
        load(path, [override])


def test_the_report_plan_is_derived_as_the_reports_say() -> None:
    config = compose(["experiment=k25_pretrain_4k"])
    assert (config.world_size, config.dp, config.expert_dp) == (256, 16, 1)
    derived = yaml.safe_load(to_yaml(config))["derived"]
    assert derived["tokens_per_step"] == 67_108_864
    assert round(derived["tokens_total"] / 1e11) == 150  # K2.5, table 3


@pytest.mark.parametrize(
    ("content", "message"), [(None, "No such file"), ("a: [", "cannot be read"), ("- 1", "is not a")]
)
def test_load_names_a_bad_file(tmp_path: Path, content: str | None, message: str) -> None:
    path = tmp_path / "config.yaml"
    if content is not None:
        path.write_text(content)
    with pytest.raises(ConfigError, match=message) as caught:
        load(path)
    assert str(path) in str(caught.value)


def test_config_has_no_defaults_of_its_own() -> None:
    with pytest.raises(TypeError, match="missing"):
        Config()  # type: ignore[call-arg]


def test_adamw_differs_from_muonclip_in_its_rules_only() -> None:
    adamw, muonclip = (compose(["experiment=smoke", f"optim={name}"]).optim for name in OptimName.__members__)
    assert {adamw.of(part).name for part in ModelPart} == {OptimName.adamw}
    assert {muonclip.of(part).name for part in ModelPart} == {OptimName.muonclip}
    parts = {part.value: muonclip.of(part) for part in ModelPart}
    assert replace(adamw, qk_clip_threshold=100.0, **parts) == muonclip
