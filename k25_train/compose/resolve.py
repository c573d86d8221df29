"""From overrides and the YAML files of `conf/` to one typed, checked `Config`, and back to YAML.

Every failure that can be found is found before anything is raised: unknown and missing keys, values of a
wrong type and broken rules, within a section and across sections, are listed in one `ConfigError`.
"""

from collections.abc import Mapping, Sequence
from dataclasses import fields
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple, cast

from k25_train.compose.checks import find_problems
from k25_train.compose.conf_files import CONF_DIR, compose_files, group_choices
from k25_train.compose.derived import derived_sizes
from k25_train.compose.migrations import SAID_BY, VERSION, VERSION_KEY, migrate
from k25_train.compose.overrides import apply, find_choices, parse
from k25_train.compose.plan_checks import find_plan_problems
from k25_train.compose.references import find_references, resolve_references
from k25_train.compose.run_length import with_steps, without_length
from k25_train.compose.sections import build_section, may_be_null, section_of, suggestion, unknown_keys
from k25_train.compose.values import NULL, WHOLE
from k25_train.compose.yaml_files import dump, read_file
from k25_train.config.leaves import plain, plain_values
from k25_train.config.schema import Config
from k25_train.errors import ConfigError
from parallel.config import Problem

if TYPE_CHECKING:
    from upath import UPath

__all__ = [
    "CONF_DIR",
    "Loaded",
    "compose",
    "compose_values",
    "describe",
    "group_choices",
    "load",
    "resolve",
    "to_yaml",
]

DERIVED = "derived"
"""Key of the sizes that a saved configuration holds for human readers only."""


def compose(overrides: Sequence[str]) -> Config:
    """The configuration that these command-line overrides give, e.g. `["experiment=smoke", "train.seed=7"]`.

    Raises:
        ConfigError: an override or the configuration it leads to breaks a rule.
    """
    return resolve(*compose_values(overrides))


def compose_values(overrides: Sequence[str]) -> tuple[dict[str, Any], list[Problem]]:
    """What `conf/` and the overrides say, as typed, and what is wrong with it so far; see `resolve`.

    The choice of a group is a name in `conf/` or a YAML file of the user's.

    Raises:
        ConfigError: an argument is no override, a group has no such choice, or no experiment is chosen.
    """
    settings, problems = parse(overrides)
    groups = group_choices()
    choices = {each.key: each.value for each in settings if each.key in groups and each.value is not None}
    files = {group: Path(choice) for group, choice in choices.items() if choice.endswith(".yaml")}
    for group, choice in choices.items():
        if group not in files and choice not in groups[group]:
            remedy = suggestion(choice, groups[group], "choices")
            problems.append(Problem(group, choice, f"is not a choice of {group}", remedy))
    if "experiment" not in choices:
        remedy = f"experiment=NAME with one of {', '.join(groups['experiment'])}"
        problems.append(Problem("experiment", None, "must be chosen", remedy))
    if problems:
        raise ConfigError(describe(problems))
    values = compose_files(choices, files)
    problems = apply([each for each in settings if each.key not in choices or each.value is None], values)
    values, unresolved = resolve_references(values)
    return values, problems + unresolved


def resolve(values: Mapping[str, Any], problems: Sequence[Problem] = ()) -> Config:
    """Typed sections of nested values, all rules checked and no value changed; `train.steps` follows from
    `train.tokens` where it is null.

    Args:
        values: texts as typed (`values.read`), or values that have their types already.
        problems: what is known to be wrong already.

    Raises:
        ConfigError: lists every unknown or missing key, wrong type and broken rule.
    """
    # 1. Each section by itself: known keys, all of them, of the right types.
    values = with_steps(values)
    problems = [*problems, *unknown_keys(values, Config, "")]
    sections: dict[str, Any] = {}
    for field in fields(Config):
        if may_be_null(field.type) and values.get(field.name) in (None, NULL):
            sections[field.name] = None
            continue
        section_type = cast(type, section_of(field.type))
        section, found = build_section(values.get(field.name, {}), section_type, field.name)
        problems += [without_length(problem, values) for problem in found]
        if section is not None:
            sections[field.name] = section
    # 2. Rules within the sections that could be built, and across them.
    problems += find_problems(sections)
    # 3. Rules that plan a whole step, which need everything else to hold.
    if not problems:
        config = Config(**sections)
        problems = find_plan_problems(config)
    if problems:
        raise ConfigError(describe([_of_earlier_version(problem) for problem in problems]))
    return config


def _of_earlier_version(problem: Problem) -> Problem:
    """The same with what says it now, if it is an unknown key that earlier versions had."""
    if problem.key not in SAID_BY or "is not a key" not in problem.rule:
        return problem
    rule, now = "was a key of earlier versions", SAID_BY[problem.key]
    return problem._replace(
        rule=rule, remedy=f"leave it out: {now} {'say' if ' and ' in now else 'says'} it now"
    )


class Loaded(NamedTuple):
    """A configuration from a file."""

    config: Config
    """What the file and the overrides say."""
    notes: list[str]
    """One line for each key that an earlier version of this code wrote differently, or not at all."""


def load(path: "Path | UPath", overrides: Sequence[str] = ()) -> Loaded:
    """The configuration that `to_yaml` wrote into a file, changed by `overrides` such as `train.seed=7`.

    A file of an earlier version is brought up to this one first (`migrations`).

    Raises:
        ConfigError: the file is absent, is not YAML, is of a later version, or breaks a rule; an override
            cannot be read.
    """
    saved = read_file(path)
    # 1. The keys of today.
    version = saved.get(VERSION_KEY)
    if isinstance(version, str) and WHOLE.fullmatch(version) and len(version) < 10:
        saved[VERSION_KEY] = int(version)
    try:
        values, notes = migrate(saved)
    except ConfigError as error:
        raise ConfigError(f"{path}: {error}") from error
    values.pop(DERIVED, None)
    # 2. What the caller changes.
    settings, problems = parse(overrides)
    problems += [*find_references(values), *find_choices(settings, group_choices())]
    if problems:
        raise ConfigError(describe(problems, str(path)))
    problems = apply(settings, values)
    values, unresolved = resolve_references(values)
    # 3. The same checks as for a composed configuration.
    return Loaded(resolve(values, problems + unresolved), notes)


def to_yaml(config: Config) -> str:
    """The configuration, the version of its keys and the sizes derived from it, as `config.yaml` of a run
    folder holds them."""
    return dump({VERSION_KEY: VERSION, **plain_values(config), DERIVED: derived_sizes(config)})


def describe(problems: Sequence[Problem], where: str = "the configuration") -> str:
    """All problems as one text."""
    count = "1 problem" if len(problems) == 1 else f"{len(problems)} problems"
    lines = [f"{count} in {where}"]
    for key, value, rule, remedy in problems:
        shown = key if value is None else f"{key}={plain(value)}"
        lines += [f"  {shown}", f"      {rule}", f"      -> {remedy}"]
    return "\n".join(lines)
