"""From overrides and the YAML files of `conf/` to one typed, checked `Config`, and back to YAML.

Every failure that can be found is found before anything is raised: unknown and missing keys, values of a
wrong type and broken rules, within a section and across sections, are listed in one `ConfigError`.
"""

import re
from collections.abc import Sequence
from dataclasses import asdict, fields
from enum import Enum
from pathlib import Path
from typing import Any, NamedTuple, cast

import hydra
import yaml
from hydra.errors import HydraException
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from k25_train.compose.checks import find_problems
from k25_train.compose.derived import derived_sizes
from k25_train.compose.migrations import VERSION, VERSION_KEY, migrate
from k25_train.compose.plan_checks import find_plan_problems
from k25_train.compose.sections import build_section, suggestion, unknown_keys
from k25_train.config.schema import Config
from k25_train.errors import ConfigError
from parallel.config import Problem

PACKAGE = Path(__file__).resolve().parents[1]
CONF_DIR = next(path for path in (PACKAGE / "conf", PACKAGE.parent / "conf") if path.is_dir())
"""Folder of the YAML files: inside the package in a wheel, next to it in a checkout."""
CONFIG_NAME = "train"
"""The primary config file."""
DERIVED = "derived"
"""Key of the sizes that a saved configuration holds for human readers only."""


def compose(overrides: Sequence[str]) -> Config:
    """The configuration that these command-line overrides give, e.g. `["experiment=smoke", "train.seed=7"]`.

    Raises:
        ConfigError: an override or the configuration it leads to breaks a rule.
    """
    try:
        with hydra.initialize_config_dir(str(CONF_DIR), version_base="1.3"):
            composed = hydra.compose(CONFIG_NAME, accept_new_keys(overrides))
    except (HydraException, OmegaConfBaseException) as error:
        raise ConfigError(f"{' '.join(overrides)}: hydra refuses this: {error}") from error
    return resolve(composed)


def resolve(cfg: DictConfig) -> Config:
    """Typed sections of a composed configuration, all rules checked and no value changed.

    Raises:
        ConfigError: lists every unknown or missing key, wrong type and broken rule.
    """
    try:
        values = OmegaConf.to_container(cfg, resolve=True)
    except OmegaConfBaseException as error:
        raise ConfigError(str(error)) from error
    assert isinstance(values, dict), "hydra composes a mapping"
    # 1. Each section by itself: known keys, all of them, of the right types.
    problems = unknown_keys(values, Config, "")
    sections: dict[str, Any] = {}
    for field in fields(Config):
        section, found = build_section(values.get(field.name, {}), cast(type, field.type), field.name)
        problems += found
        if section is not None:
            sections[field.name] = section
    # 2. Rules within the sections that could be built, and across them.
    problems += find_problems(sections)
    # 3. Rules that plan a whole step, which need everything else to hold.
    if not problems:
        config = Config(**sections)
        problems = find_plan_problems(config)
    if problems:
        raise ConfigError(describe(problems))
    return config


class Loaded(NamedTuple):
    """A configuration from a file."""

    config: Config
    """What the file and the overrides say."""
    notes: list[str]
    """One line for each key that an earlier version of this code wrote differently, or not at all."""


def load(path: Path, overrides: Sequence[str] = ()) -> Loaded:
    """The configuration that `to_yaml` wrote into a file, changed by `overrides` such as `train.seed=7`.

    A file of an earlier version is brought up to this one first (`migrations`).

    Raises:
        ConfigError: the file is absent, is not YAML, is of a later version, or breaks a rule; an override
            cannot be read.
    """
    try:
        cfg = OmegaConf.load(path)
    except (OSError, yaml.YAMLError) as error:
        raise ConfigError(f"{path}: cannot be read as a configuration: {error}") from error
    if not isinstance(cfg, DictConfig):
        raise ConfigError(f"{path}: is not a configuration; expected the config.yaml of a run folder")
    # 1. The keys of today.
    try:
        values, notes = migrate(cast(dict[str, Any], OmegaConf.to_container(cfg)))
    except ConfigError as error:
        raise ConfigError(f"{path}: {error}") from error
    values.pop(DERIVED, None)
    # 2. What the caller changes.
    cfg = OmegaConf.create(values)
    for override in overrides:
        key, equals, value = override.partition("=")
        if not equals:
            raise ConfigError(f"{override}: is not an override; write SECTION.KEY=VALUE")
        try:
            OmegaConf.update(cfg, key, yaml.safe_load(value), force_add=True)
        except (yaml.YAMLError, OmegaConfBaseException) as error:
            raise ConfigError(f"{override}: cannot be read as an override: {error}") from error
    # 3. The same checks as for a composed configuration.
    return Loaded(resolve(cfg), notes)


def to_yaml(config: Config) -> str:
    """The configuration, the version of its keys and the sizes derived from it, as `config.yaml` of a run
    folder holds them."""
    values = asdict(config, dict_factory=lambda items: {key: plain(value) for key, value in items})
    return yaml.safe_dump({VERSION_KEY: VERSION, **values, DERIVED: derived_sizes(config)}, sort_keys=False)


def group_choices() -> dict[str, list[str]]:
    """Config group -> its choices, from the files of `conf/`."""
    groups = sorted(path for path in CONF_DIR.iterdir() if path.is_dir())
    return {group.name: sorted(file.stem for file in group.glob("*.yaml")) for group in groups}


def accept_new_keys(arguments: Sequence[str]) -> list[str]:
    """Arguments with every `key=value` turned into `++key=value`; group choices and flags are unchanged.

    hydra stops at the first unknown key and suggests adding it with `+`. Forced in, all of them reach
    `resolve`, which refuses them together and suggests the right names.

    Raises:
        ConfigError: a group has no such choice, or no experiment is chosen.
    """
    groups = group_choices()
    problems = []
    for argument in arguments:
        group, _, choice = argument.partition("=")
        if group in groups and choice not in groups[group]:
            rule = f"is not a choice of {group}"
            remedy = suggestion(choice, groups[group], "choices")
            problems.append(Problem(group, choice, rule, remedy))
    flags = any(argument.startswith("-") for argument in arguments)
    if not flags and not any(argument.startswith("experiment=") for argument in arguments):
        remedy = f"experiment=NAME with one of {', '.join(groups['experiment'])}"
        problems.append(Problem("experiment", None, "must be chosen", remedy))
    if problems:
        raise ConfigError(describe(problems))
    return [
        f"++{argument}"
        if re.match(r"\w[\w.]*=", argument) and argument.partition("=")[0] not in groups
        else argument
        for argument in arguments
    ]


def plain(value: object) -> object:
    """The value of an enum; anything else unchanged."""
    return value.value if isinstance(value, Enum) else value


def describe(problems: Sequence[Problem], where: str = "the configuration") -> str:
    """All problems as one text."""
    count = "1 problem" if len(problems) == 1 else f"{len(problems)} problems"
    lines = [f"{count} in {where}"]
    for key, value, rule, remedy in problems:
        shown = key if value is None else f"{key}={plain(value)}"
        lines += [f"  {shown}", f"      {rule}", f"      -> {remedy}"]
    return "\n".join(lines)
