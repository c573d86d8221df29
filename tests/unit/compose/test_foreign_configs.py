"""A configuration that comes from elsewhere can say what is trained, and read or run nothing."""

import os
from pathlib import Path

import pytest

from k25_train.checkpoint.continuity import check_continuity
from k25_train.compose.resolve import compose, load, to_yaml
from k25_train.errors import ConfigError, K25Error

SECRET = "hunter2-of-the-environment"
HOSTILE = {
    "the environment": "${oc.env:K25_SECRET}",
    "the environment, decoded": "${oc.decode:${oc.env:K25_SECRET}}",
    "the environment with a default": "${oc.env:K25_SECRET,none}",
    "hydra": "${hydra:runtime.cwd}",
    "another key": "${run.dir}",
    "a resolver": "${oc.create:${oc.env:K25_SECRET}}",
    "a lone opening": "${",
    "a call by tag": '!!python/object/apply:os.system ["touch {marker}"]',
    "a module by tag": "!!python/module:os",
    "a name by tag": "!!python/name:os.system",
    "a tag of one's own": "!include /etc/passwd",
    "bytes by tag": "!!binary aGVsbG8=",
}


@pytest.fixture(params=HOSTILE, ids=str)
def foreign(request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The saved configuration of a run, with a hostile value for the folder of its data."""
    monkeypatch.setenv("K25_SECRET", SECRET)
    text = to_yaml(compose(["experiment=smoke"]))
    value = HOSTILE[request.param].replace("{marker}", str(tmp_path / "ran"))
    (line,) = [line for line in text.splitlines() if line.startswith("  dir: datasets")]
    file = tmp_path / "config.yaml"
    file.write_text(text.replace(line, f"  dir: {value}"))
    return file


def test_a_saved_configuration_reads_and_runs_nothing(foreign: Path, tmp_path: Path) -> None:
    with pytest.raises(ConfigError) as caught:
        load(foreign, ["train.seed=3"])
    assert str(foreign) in str(caught.value)
    assert SECRET not in str(caught.value)
    assert not (tmp_path / "ran").exists()


def test_neither_does_the_one_of_a_checkpoint(foreign: Path, tmp_path: Path) -> None:
    """Whether training may go on from it is decided by reading it."""
    try:
        check_continuity(foreign.parent, compose(["experiment=smoke"]), ("model", "data"))
    except K25Error as error:
        assert SECRET not in str(error)
    assert not (tmp_path / "ran").exists()


def test_quotes_make_it_a_text(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A folder may be called anything; what is written is what is read, not what it looks like."""
    monkeypatch.setenv("K25_SECRET", SECRET)
    strange = compose(["experiment=smoke", "data.dir='${oc.env:K25_SECRET}'"])
    assert strange.data.dir == "${oc.env:K25_SECRET}"
    file = tmp_path / "config.yaml"
    file.write_text(to_yaml(strange))
    assert load(file).config == strange


def test_aliases_that_multiply_are_refused(tmp_path: Path) -> None:
    """Nine levels of nine aliases are a billion values in a kilobyte."""
    levels = ["a0: &a0 [x, x, x, x, x, x, x, x, x]"]
    levels += [f"a{n}: &a{n} [{', '.join([f'*a{n - 1}'] * 9)}]" for n in range(1, 10)]
    file = tmp_path / "config.yaml"
    file.write_text("\n".join(levels) + "\n")
    with pytest.raises(ConfigError, match="more than"):
        load(file)


def test_nesting_without_end_is_refused(tmp_path: Path) -> None:
    file = tmp_path / "config.yaml"
    file.write_text("model: " + "[" * 50_000)
    with pytest.raises(ConfigError):
        load(file)
    file.write_text("model: &a {model: *a}\n")
    with pytest.raises(ConfigError):
        load(file)


@pytest.mark.parametrize("name", ["a\nrm -rf x", "$(id)", "a b", "`id`"])
def test_a_clusters_name_is_no_line_of_the_script(name: str) -> None:
    with pytest.raises(ConfigError, match=r"cluster\.name"):
        compose(["experiment=smoke", f"cluster.name={name}"])


def test_the_environment_is_for_who_starts_the_run(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("K25_SECRET", "elsewhere")
    assert compose(["experiment=smoke", "data.dir=${oc.env:K25_SECRET}"]).data.dir == "elsewhere"
    assert "K25_SECRET" in os.environ
