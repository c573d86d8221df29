"""What `conf/` and the checks of training offer to a search of layouts (`k25_train/plan/search`)."""

from collections.abc import Mapping
from dataclasses import fields
from typing import Any

from k25_train.compose.checks import find_problems
from k25_train.compose.conf_files import choice_values, group_choices
from k25_train.compose.plan_checks import find_plan_problems, problems_of_plan
from k25_train.compose.resolve import describe
from k25_train.compose.sections import build_section
from k25_train.config.activation import ActivationConfig
from k25_train.config.rates import RatesConfig
from k25_train.config.schema import Config
from k25_train.errors import ConfigError
from k25_train.plan.offer import Offer
from parallel.config import Problem


def offer() -> Offer:
    """Every choice of activation policies and devices, and the rules that `compose` checks."""
    return Offer(
        activations=_built("activation", ActivationConfig),
        devices=_built("device", RatesConfig),
        find_problems=problems_of,
        find_plan_problems=find_plan_problems,
        problems_of_plan=problems_of_plan,
    )


def problems_of(config: Config) -> list[Problem]:
    """Rules that a configuration breaks, as `compose` finds them, but for those that plan a whole step."""
    return find_problems({field.name: getattr(config, field.name) for field in fields(config)})


def _built(group: str, section: type) -> Mapping[str, Any]:
    """Choice of a group -> its section."""
    built = {}
    for name in group_choices()[group]:
        built[name], problems = build_section(choice_values(group, name), section, group)
        if problems:
            raise ConfigError(describe(problems, f"conf/{group}/{name}.yaml"))
    return built
