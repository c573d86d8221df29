"""Command lines that are not settings, and files that are not configurations: what the refusal says."""

from pathlib import Path

import pytest

from k25_train.compose.resolve import compose, load, to_yaml
from k25_train.compose.yaml_files import MOST_NODES, read_file
from k25_train.errors import ConfigError


def refusal(*arguments: str) -> str:
    with pytest.raises(ConfigError) as caught:
        compose(["experiment=smoke", *arguments])
    return str(caught.value)


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["train.steps", "7"], "train.steps\n      is not an override\n      -> write SECTION.KEY=VALUE"),
        (["train.steps", "7"], "here train.steps=7"),
        (["--train.steps=7"], "--train.steps=7\n      is not an option of this command"),
        (["--train.steps=7"], "here train.steps=7"),
        (["--train.stpes", "7"], "did you mean train.steps=7?"),
        (["train.steps =7"], "here train.steps=7"),
        (["x=y"], "x=y\n      is not a key of the configuration\n      -> known keys: model,"),
        (["trian.steps=3"], "did you mean train? known keys"),
        (["train.=3"], "train.=3\n      is not an override"),
        ([""], "is not an override"),
        (["=3"], "is not an override"),
        (["~train.steps=3"], "~train.steps=3\n      is not an override"),
        (["-m", "train.seed=1,2"], "-m\n      is not an option of this command\n      -> sweeps are"),
        (["--multirun"], "sweeps are not done"),
        (["--run"], "leave it out"),
        (["--config-dir=x"], "use --config FILE"),
        (["--config-name", "x"], "choose with experiment=NAME"),
        (["--experimental-rerun=x"], "use --config FILE"),
        (["--hydra-help"], "is not an option of this command"),
        (["hydra.run.dir=x"], "is hydra's own"),
        (["hydra/launcher=x"], "is not an override"),
        (["model@x=k25_tiny"], "is not an override"),
        (["~data.sources.captoin"], "~data.sources.captoin\n      takes away a key that is not there"),
        (["~data.sources.captoin"], "did you mean caption?"),
        (["run.dir=~/x"], "run.dir=~/x\n      starts with ~, which nothing replaces\n      -> write $HOME/"),
        (["data.dir=~"], "starts with ~"),
        (["train.seed=1,2"], "train.seed=1,2\n      must be a whole number, in decimal digits"),
        (["data.schedule.late={from_step:1,weights:{a 1}}"], "weights={a 1}\n      must be a mapping"),
        (["train={steps: 1_0}"], "train.steps=1_0\n      must be a whole number"),
        (["train={steps"], "train={steps\n      is a section, not a value"),
        (["run.dir=${oc.env:NO_SUCH_VARIABLE}"], "refers to the environment variable NO_SUCH_VARIABLE"),
        (["run.dir=${oc.env:A}/${"], "has a reference that cannot be read"),
        (["run.dir=${now:%Y}"], "has a reference that cannot be read"),
        (["run.dir=${no.such}"], "refers to no.such, which has no value"),
        (["run.dir=${model.name}", "model.name=${run.dir}"], "refers back to it"),
    ],
)  # fmt: skip
def test_what_is_refused_on_the_command_line(arguments: list[str], words: str) -> None:
    assert words in refusal(*arguments)


def test_everything_that_is_wrong_is_in_one_report() -> None:
    text = refusal("-m", "train.steps", "--x", "optim=adamm")
    assert text.startswith("4 problems")


def test_references_are_followed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WHERE", "/runs/1_0")
    monkeypatch.setenv("SEED", "12")
    monkeypatch.setenv("HEX", "0x10")
    found = compose(
        ["experiment=smoke", "run.dir=${oc.env:WHERE}/${model.name}", "train.seed=${oc.env:SEED}"]
    )
    assert (found.run.dir, found.train.seed) == ("/runs/1_0/k25_tiny", 12)
    assert compose(["experiment=smoke", "run.dir='${oc.env:WHERE}'"]).run.dir == "${oc.env:WHERE}"
    assert compose(["experiment=smoke", "run.dir=${oc.env:NONE,a b}"]).run.dir == "a b"
    assert "train.seed=0x10\n      must be a whole number" in refusal("train.seed=${oc.env:HEX}")


@pytest.fixture(scope="module")
def text() -> str:
    return to_yaml(compose(["experiment=smoke"]))


@pytest.mark.parametrize(
    ("old", "new", "words"),
    [
        (None, "", "is not a configuration but empty"),
        (None, "- 1", "is not a configuration but a list"),
        (None, "7", "is not a configuration but a single value"),
        (None, "a: [", "cannot be read as a configuration"),
        (None, "a:\n\tb: 1", "cannot be read as a configuration"),
        (None, "a: 1\n---\nb: 2", "cannot be read as a configuration"),
        (None, "? [1]\n: 2", "a key is a single word"),
        (None, "[" * 1200, "is nested too deeply"),
        ("  seed: 1234", "  seed: 1\n  seed: 2", "the key seed is there twice"),
        ("  seed: 1234", "  seed: !!python/object/apply:os.system [ls]", "tag:yaml.org,2002:python"),
        ("  seed: 1234", "  seed: !!int 7", "the tag tag:yaml.org,2002:int is not read"),
        ("  seed: 1234", "  seed:", "train.seed\n      must be given"),
        ("  seed: 1234", "  seed: ${oc.env:HOME}", "refers to something, which a saved one may not"),
        ("dir: runs/smoke", "dir: a${oc.env:HOME}", "refers to something"),
        ("  seed: 1234", "  seed: 1234\n  <<: {steps: 3}", "train.<<"),
        ("config_version: ", "config_version: x", "config_version=x"),
        ("config_version: ", "config_version: 99", "must be a version that this code knows"),
    ],
)  # fmt: skip
def test_what_is_refused_of_a_file(tmp_path: Path, text: str, old: str | None, new: str, words: str) -> None:
    assert old is None or old in text
    path = tmp_path / "config.yaml"
    path.write_text(new if old is None else text.replace(old, new), encoding="utf-8")
    with pytest.raises(ConfigError) as caught:
        load(path)
    assert words in str(caught.value)
    assert str(path) in str(caught.value) or "\n  train." in str(caught.value)


def test_what_is_no_text_and_what_grows_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "config.yaml"
    path.write_bytes(b"a: \xff")
    with pytest.raises(ConfigError, match="is not UTF-8"):
        read_file(path)
    with pytest.raises(ConfigError, match="cannot be read as a configuration: Is a directory"):
        read_file(tmp_path)
    levels = ["a0: &a0 [x, x, x, x, x, x, x, x, x, x]"]
    levels += [f"a{n}: &a{n} [{', '.join([f'*a{n - 1}'] * 10)}]" for n in range(1, 9)]
    path.write_text("\n".join(levels), encoding="utf-8")
    with pytest.raises(ConfigError, match=f"more than {MOST_NODES} values"):
        read_file(path)


def test_a_saved_configuration_takes_no_choices(tmp_path: Path, text: str) -> None:
    path = tmp_path / "config.yaml"
    path.write_text("\ufeff" + text, encoding="utf-8")
    with pytest.raises(ConfigError, match=r"optim=adamw\n *chooses a file of conf/"):
        load(path, ["optim=adamw"])
    assert load(path).config == compose(["experiment=smoke"])
