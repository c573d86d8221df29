"""Texts stay texts and numbers decimal, on every path into a configuration."""

import dataclasses
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import example, given, settings
from hypothesis import strategies as st

from k25_train.compose import conf_files
from k25_train.compose.references import refers
from k25_train.compose.resolve import compose, load, to_yaml
from k25_train.compose.sections import section_of
from k25_train.compose.values import MISSING, NULL, UnreadableError, is_quoted, quote, read, unquote
from k25_train.compose.yaml_files import dump, read_text
from k25_train.config.basics import DType
from k25_train.config.schema import Config
from k25_train.errors import ConfigError

BASE = ("experiment=smoke", "cluster=local_slurm")
TEXTS = (
    *"2024_07 1e3 1_000 0x10 1:30 007 .5 1e999 nan true off yes No 2024-01-02 ~ Null NULL None = <<".split(),
    *"* & ! ? : # {} [] {a:1} [1,2] a=b=c a: it's \"a\"b\" 'a'b' $HOME $ a\\'b //x C:\\x %".split(),
    *(" a", "a ", "  ", "a b", "a\nb", "a #b", "a: b", "- a", "", "\ufeff", "\x85", "é", "\udcff", "\u2028"),
)
"""What YAML, hydra or Python would take for something else, or strip."""
ON_EVERY_PATH = (
    "2024_07",
    "1e3",
    "true",
    "~",
    "1:30",
    "",
    " a ",
    "a=b=c",
    "{a:1}",
    "[1,2]",
    "it's",
    "a: b #c",
    "é\n",
)


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A saved configuration."""
    path = tmp_path_factory.mktemp("saved") / "config.yaml"
    path.write_text(to_yaml(compose(BASE)), encoding="utf-8")
    return path


def as_typed(text: str) -> str:
    """What a user types to mean the text: itself, unless it would mean something else."""
    return quote(text) if text in (NULL, MISSING) or is_quoted(text) or refers(text) else text


@pytest.mark.parametrize("text", ON_EVERY_PATH)
def test_a_text_arrives_as_typed_on_every_path(
    text: str, saved: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("NAMED", text)
    for typed in (text, "${oc.env:NAMED}"):
        assert compose([*BASE, f"model.name={typed}"]).model.name == text
        assert load(saved, [f"model.name={typed}"]).config.model.name == text


@pytest.mark.parametrize("text", TEXTS)
def test_a_text_is_read_as_typed(text: str) -> None:
    assert read(str, text) == read(str | None, text) == text
    assert read(str, read_text(dump({"name": text}), "here")["name"]) == text


@settings(max_examples=300)
@given(st.text())
@example("???")
@example("null")
@example("'a'")
@example("a${oc.env:HOME}b")
@example("x" * 300 + "  " + "y" * 300)
def test_any_text_survives_command_line_yaml_and_load(text: str) -> None:
    values = {"name": read(str, as_typed(text))}
    assert values["name"] == text
    written = dump({"names": [text], **values, "may_be_null": text})
    again = read_text(written, "here")
    assert read(str, again["name"]) == text
    assert read(str | None, again["may_be_null"]) == text
    assert read(list[str], again["names"]) == [text]
    assert not refers(again["name"]) and written.isascii()


@settings(max_examples=200)
@given(st.text())
def test_quotes_come_off_again(text: str) -> None:
    assert unquote(quote(text)) == text
    assert read(list[str], f"[{quote(text)}, {quote(text)}]") == [text, text]


def text_fields(kind: type = Config, path: str = "") -> Iterator[tuple[str, Any]]:
    """Dotted name and type of every field that may hold a text."""
    for field in dataclasses.fields(kind):
        section = section_of(field.type)
        if section is not None:
            yield from text_fields(section, f"{path}{field.name}.")
        elif field.type in (str, str | None):
            yield f"{path}{field.name}", field.type


WITH_FORMS = (
    "parallelism.",
    "checkpoint.local_interval",
    "train.tokens",
    "rollout.",
    "environment.",
    "cluster.fabric.",
    "cluster.gpu.",
    "cluster.kubernetes.",
    *(f"cluster.slurm.{name}" for name in ("gres", "mem", "exclude", "container_credentials")),
)
"""Fields whose rules want more than a text."""


@pytest.mark.parametrize("text", ["2024_07", "1e3", "true", "1:30", "007", "0x10", "off"])
def test_every_text_field_is_one(text: str, saved: Path, tmp_path: Path) -> None:
    fields = [key for key, _ in text_fields() if not key.startswith(WITH_FORMS)]
    assert len(fields) >= 9
    config = compose([*BASE, *(f"{key}={text}" for key in fields)])
    again = tmp_path / "again.yaml"
    again.write_text(to_yaml(config), encoding="ascii")
    for found in (config, load(again).config, load(saved, [f"{key}={text}" for key in fields]).config):
        for key in fields:
            value: Any = found
            for name in key.split("."):
                value = getattr(value, name)
            assert value == text, key


def test_yaml_by_hand_is_read_as_the_command_line_is(saved: Path, tmp_path: Path) -> None:
    by_hand = tmp_path / "by_hand.yaml"
    values = yaml.safe_load(saved.read_text(encoding="utf-8"))
    values["cluster"]["slurm"]["account"] = "ACCOUNT"
    text = yaml.safe_dump(values).replace("ACCOUNT", "2024_07").replace("steps: 160", "steps: 0160")
    by_hand.write_text(text, encoding="utf-8-sig")
    with pytest.raises(ConfigError, match=r"train\.steps=0160\n *must be a whole number"):
        load(by_hand)
    by_hand.write_text(text.replace("steps: 0160", "steps: 160"), encoding="utf-8-sig")
    slurm = load(by_hand).config.cluster.slurm
    assert slurm is not None and slurm.account == "2024_07"


@pytest.mark.parametrize(
    ("text", "number"), [("7", 7), ("+7", 7), ("-3", -3), ("0", 0), (" 7 ", 7), ("'7'", 7)]
)
def test_whole_numbers(text: str, number: int) -> None:
    assert read(int, text) == number


@pytest.mark.parametrize(
    "text",
    [
        *"1_000 0x10 0o7 0b1 1e3 1:30 007 1.0 - ٣ true null 1,000 10m".split(),
        *("", "1 0", "9" * 30, "9" * 9000, str(2**63)),
    ],
)
def test_what_is_no_whole_number(text: str) -> None:
    with pytest.raises(UnreadableError):
        read(int, text)


@pytest.mark.parametrize(
    ("text", "number"),
    [("1e3", 1000.0), (".5", 0.5), ("5.", 5.0), ("1E-3", 1e-3), ("-2", -2.0), ("0e5", 0.0)],
)
def test_decimals(text: str, number: float) -> None:
    assert read(float, text) == number


@pytest.mark.parametrize(
    "text", ["1_0.5", "inf", ".inf", "nan", "1e999", "1e-999", "0x1p3", "1:30", "05.1", "1e", ""]
)
def test_what_is_no_decimal(text: str) -> None:
    with pytest.raises(UnreadableError):
        read(float, text)


@settings(max_examples=200)
@given(st.floats(allow_nan=False, allow_infinity=False), st.integers(1 - 2**63, 2**63 - 1))
def test_numbers_survive_to_the_bit(decimal: float, whole: int) -> None:
    again = read_text(dump({"decimal": decimal, "whole": whole}), "here")
    assert read(float, again["decimal"]).hex() == decimal.hex()
    assert read(int, again["whole"]) == whole
    assert read(float, repr(decimal)).hex() == decimal.hex()


@pytest.mark.parametrize(
    ("kind", "text", "value"),
    [
        (bool, "true", True),
        (bool, "False", False),
        (int | None, "null", None),
        (str | None, "null", None),
        (str | None, "'null'", "null"),
        (str, "null", "null"),
        (str | None, "~", "~"),
        (int | str, "3", 3),
        (int | str, "0x3", "0x3"),
        (DType, "bfloat16", DType.bfloat16),
        (list[str], "[]", []),
        (list[str], "[/a:/b, '/c,d:/e', it's]", ["/a:/b", "/c,d:/e", "it's"]),
        (dict[str, float], "{text:1.0}", {"text": 1.0}),
        (dict[str, float], "{ 'text' : 0.5,caption: .5 }", {"text": 0.5, "caption": 0.5}),
    ],
)
def test_other_types(kind: Any, text: str, value: object) -> None:
    assert read(kind, text) == value


@pytest.mark.parametrize(
    ("kind", "text"),
    [
        (bool, "on"), (bool, "yes"), (bool, "1"), (bool, ""), (int | None, "~"), (int | None, "None"),
        (DType, "Float32"), (DType, "0"), (list[str], "a"), (list[str], "[a,,b]"), (list[str], "[a"),
        (list[str], "[a]]"), (dict[str, float], "{a: 1, a: 2}"), (dict[str, float], "{a}"),
        (dict[str, float], "{a: 1_0}"), (dict[str, float], "{: 1}"),
    ],
)  # fmt: skip
def test_what_other_types_are_not(kind: Any, text: str) -> None:
    with pytest.raises(UnreadableError):
        read(kind, text)


PHASE = "data.schedule.late={from_step: 9, weights: {text: 0.6, ocr: 0.4}}"
REPLACED = "data.schedule.late.weights={text:1.0}"


@pytest.mark.parametrize("through", ["compose", "load"])
@pytest.mark.parametrize(
    ("settings_of_weights", "weights"),
    [
        ([REPLACED], {"text": 1.0}),
        (["data.schedule.late.weights={text: 0.5, caption: 0.5}"], {"text": 0.5, "caption": 0.5}),
        (["data.schedule.late.weights.text=0.7"], {"text": 0.7, "ocr": 0.4}),
        ([REPLACED, "data.schedule.late.weights.ocr=0.5"], {"text": 1.0, "ocr": 0.5}),
        (["data.schedule.late.weights.text=9", REPLACED], {"text": 1.0}),
    ],
)
def test_a_mapping_is_replaced_and_an_entry_changed(
    through: str, settings_of_weights: list[str], weights: dict[str, float], tmp_path: Path
) -> None:
    if through == "compose":
        config = compose([*BASE, PHASE, *settings_of_weights])
    else:
        (tmp_path / "config.yaml").write_text(to_yaml(compose([*BASE, PHASE])), encoding="utf-8")
        config = load(tmp_path / "config.yaml", settings_of_weights).config
    assert config.data.schedule["late"].weights == weights


def test_an_entry_under_a_free_name_has_defaults_for_what_is_not_given() -> None:
    config = compose([*BASE, "data.sources.web={format: indexed, path: web/en, weight: 2}"])
    web = config.data.sources["web"]
    assert (web.format.value, web.path, web.weight) == ("indexed", "web/en", 2.0)
    assert (web.index, web.kinds, web.epochs, web.heldout, web.licence) == (None, [], None, 0, "")
    with pytest.raises(ConfigError, match=r"data\.sources\.web\.path\n.*must be given"):
        compose([*BASE, "data.sources.web={format: indexed}"])


@pytest.mark.parametrize(
    ("setting", "expected"),
    [
        ("setup=['source ${HOME}/a.sh', ${oc.env:K25_LINE}]", ["source ${HOME}/a.sh", "ulimit -l"]),
        ('setup=["${K25_LINE}, b"]', ["${K25_LINE}, b"]),
        ("setup=${oc.env:K25_LINES}", ["a", "b"]),
        ("={setup: ['a ${B}', c]}", ["a ${B}", "c"]),
    ],
)
def test_parts_in_quotes_are_literal_too(
    setting: str, expected: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """`${NAME}` is what shells have, too."""
    monkeypatch.setenv("K25_LINE", "ulimit -l")
    monkeypatch.setenv("K25_LINES", "[a, b]")
    key = "cluster.slurm" if setting.startswith("=") else "cluster.slurm."
    slurm = compose([*BASE, key + setting]).cluster.slurm
    assert slurm is not None and slurm.setup == expected


def test_a_reference_outside_of_quotes_is_none_of_a_part_of_a_list() -> None:
    with pytest.raises(ConfigError, match=r"cluster\.slurm\.setup\.1=.*\n.*refers to B, which has no value"):
        compose([*BASE, "cluster.slurm.setup=['${A}', ${B}]"])


def test_the_last_of_several_settings_counts(saved: Path) -> None:
    twice = ["train.seed=1", "train.seed=2", "optim=adamw", "optim=muonclip"]
    assert compose([*BASE, *twice]) == compose([*BASE, "train.seed=2"])
    assert load(saved, twice[:2]).config.train.seed == 2


def test_the_files_of_conf_are_read_as_the_command_line_is(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    conf = shutil.copytree(conf_files.CONF_DIR, tmp_path / "conf")
    monkeypatch.setattr(conf_files, "CONF_DIR", conf)
    monkeypatch.setenv("QUEUE", "0x10")
    text = (conf / "cluster/local_slurm.yaml").read_text(encoding="utf-8")
    mine = text.replace("account: null", "account: 2024_07").replace("qos: null", "qos: on")
    mine = mine.replace("partition: null", "partition: ${oc.env:QUEUE}")
    (conf / "cluster/mine.yaml").write_text(mine, encoding="utf-8")
    slurm = compose(["experiment=smoke", "cluster=mine"]).cluster.slurm
    assert slurm is not None
    assert (slurm.account, slurm.qos, slurm.partition) == ("2024_07", "on", "0x10")
    (conf / "cluster/mine.yaml").write_text(text.replace("nodes: 2", "nodes: 0x2"), encoding="utf-8")
    conf_files._composed.cache_clear()
    with pytest.raises(ConfigError, match=r"cluster\.nodes=0x2\n *must be a whole number"):
        compose(["experiment=smoke", "cluster=mine"])
    (conf / "cluster/mine.yaml").write_text(text + "\n\tx: 1", encoding="utf-8")
    conf_files._composed.cache_clear()
    with pytest.raises(ConfigError, match=r"mine\.yaml: cannot be read as a configuration"):
        compose(["experiment=smoke", "cluster=mine"])
