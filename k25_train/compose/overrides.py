"""Settings of a command line: `GROUP=CHOICE`, `SECTION.KEY=VALUE` and `~SECTION.KEY`.

The value is everything after the first `=`, as typed. Of settings of the same key the last one counts. A
value replaces what was there; only of a whole section does `{...}` change the keys that it names alone.
"""

import contextlib
import difflib
import re
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, fields
from typing import Any, get_args, get_origin

from k25_train.compose.sections import section_of, suggestion
from k25_train.compose.values import split_list, split_mapping
from k25_train.config.schema import Config
from parallel.config import Problem

KEY = r"[^\W\d]\w*(?:\.\w+)*"
SETTING = re.compile(rf"\+{{0,2}}(?P<key>{KEY})=(?P<value>.*)|~(?P<gone>{KEY})", re.DOTALL)
_SWEEP = "sweeps are not done: one command is one run; start one per value, each with its own run.dir"
_FILES = "use --config FILE with the config.yaml of a run, or add a file to conf/"
FLAGS = {
    "-m": _SWEEP,
    "--multirun": _SWEEP,
    "--experimental-rerun": "use --config FILE with the config.yaml of the run",
    "--config-path": _FILES,
    "--config-dir": _FILES,
    "--config-name": "choose with experiment=NAME",
    "--run": "leave it out: running is what the command does",
}
"""Options of hydra that a user may try, and what to do instead."""
NO_OPTION = "is not an option of this command"


@dataclass(frozen=True, slots=True)
class Setting:
    """One key of the command line."""

    key: str
    """Dotted name."""
    value: str | None
    """As typed; None takes the key away."""


def parse(arguments: Sequence[str]) -> tuple[list[Setting], list[Problem]]:
    """The settings among the arguments in their order, and what is wrong with each of the others."""
    settings, problems = [], []
    for index, argument in enumerate(arguments):
        match = SETTING.fullmatch(argument)
        if match is None:
            following = arguments[index + 1] if index + 1 < len(arguments) else ""
            problems.append(not_a_setting(argument, following))
        elif (match["key"] or match["gone"]).split(".")[0] == "hydra":
            rule = "is hydra's own and has no use here"
            problems.append(Problem(argument, None, rule, "run.dir=FOLDER says where a run writes"))
        else:
            settings.append(Setting(match["key"] or match["gone"], match["value"]))
    return settings, problems


def find_choices(settings: Sequence[Setting], groups: Mapping[str, Collection[str]]) -> list[Problem]:
    """Choices of groups, which a saved configuration has none of."""
    rule = "chooses a file of conf/, which is for new runs: a saved configuration has its values already"
    return [
        Problem(each.key, each.value, rule, f"change its keys: {each.key}.KEY=VALUE")
        for each in settings
        if each.value in groups.get(each.key, ())
    ]


def not_a_setting(argument: str, following: str = "") -> Problem:
    """What is wrong with an argument of another form; `following` is the one after it."""
    name, equals, value = argument.partition("=")
    if name in FLAGS:
        return Problem(argument, None, NO_OPTION, FLAGS[name])
    key = name.strip().lstrip("+-~").strip()
    value = value.strip() or ("" if equals or "=" in following else following) or "VALUE"
    remedy = f"write SECTION.KEY=VALUE without dashes and blanks{_example(key, value)}; --help lists the keys"
    return Problem(argument, None, NO_OPTION if argument.startswith("-") else "is not an override", remedy)


def _example(key: str, value: str) -> str:
    """How the nearest key is set."""
    if find_kind(key) is not None:
        return f", here {key}={value}"
    near = difflib.get_close_matches(key, EVERY_KEY, n=1)
    return f"; did you mean {near[0]}={value}?" if near else ""


def find_kind(key: str) -> Any:
    """The type of the field, section or entry of a mapping under a dotted key; None if there is none."""
    kind: Any = Config
    for name in key.split("."):
        section = section_of(kind)
        if section is not None:
            kind = next((field.type for field in fields(section) if field.name == name), None)
        else:
            kind = get_args(kind)[-1] if get_origin(kind) in (dict, list) else None
    return kind


def _field_keys(section: type, path: str = "") -> Iterator[str]:
    """Dotted name of every field of a section and of those in it."""
    for field in fields(section):
        yield f"{path}{field.name}"
        inner = section_of(field.type)
        if inner is not None:
            yield from _field_keys(inner, f"{path}{field.name}.")


EVERY_KEY = tuple(_field_keys(Config))
"""Every key of the schema."""


def apply(settings: Sequence[Setting], values: dict[str, Any]) -> list[Problem]:
    """Change nested values in place; returns the settings that took away what was never there."""
    present = set(_keys(values))
    problems = []
    for setting in settings:
        if setting.value is not None:
            _set(values, setting.key, setting.value)
        elif not _remove(values, setting.key) and setting.key not in present:
            rule, section = "takes away a key that is not there", setting.key.rpartition(".")[0]
            siblings = [key.rpartition(".")[2] for key in present if key.rpartition(".")[0] == section]
            remedy = suggestion(setting.key.rpartition(".")[2], sorted(siblings), "keys")
            problems.append(Problem(f"~{setting.key}", None, rule, remedy))
    return problems


def _keys(values: Mapping[str, Any], path: str = "") -> Collection[str]:
    """Every dotted key, of sections too."""
    found = []
    for name, value in values.items():
        found.append(f"{path}{name}")
        if isinstance(value, Mapping):
            found += _keys(value, f"{path}{name}.")
    return found


def _set(values: dict[str, Any], key: str, value: str) -> None:
    if section_of(find_kind(key)) is not None and value.strip().startswith("{"):
        # Anything else is reported as a value in the place of a section.
        with contextlib.suppress(ValueError):
            for name, item in split_mapping(value).items():
                _set(values, f"{key}.{name}", item)
            return
    *path, name = key.split(".")
    holder = values
    for part in path:
        # Where there is a value, or nothing, there is a mapping now: the schema says whether it may be one.
        if not isinstance(holder.get(part), dict):
            holder[part] = {}
        holder = holder[part]
    holder[name] = _in_parts(find_kind(key), value)


def _in_parts(kind: Any, value: str) -> Any:
    """A list or mapping as its parts, each as typed, so that quotes around a part are seen as such.

    What is none, as where a reference stands for all of it, remains a text.
    """
    section = section_of(kind)
    with contextlib.suppress(ValueError):
        if get_origin(kind) is list:
            return [_in_parts(get_args(kind)[0], item) for item in split_list(value)]
        if get_origin(kind) is dict:
            return {name: _in_parts(get_args(kind)[1], item) for name, item in split_mapping(value).items()}
        if section is not None:
            kinds = {field.name: field.type for field in fields(section)}
            return {name: _in_parts(kinds.get(name), item) for name, item in split_mapping(value).items()}
    return value


def _remove(values: dict[str, Any], key: str) -> bool:
    *path, name = key.split(".")
    holder: Any = values
    for part in path:
        holder = holder.get(part) if isinstance(holder, Mapping) else None
    if not isinstance(holder, dict) or name not in holder:
        return False
    del holder[name]
    return True
