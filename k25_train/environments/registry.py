"""Families of tasks, and what the policy acts in, by name; those of other packages come by entry points.

[project.entry-points."k25_train.families"]          [project.entry-points."k25_train.environments"]
riddles = "my_package.riddles:Riddles"               maze = "my_package.maze:make_maze"
"""

from collections.abc import Callable, Mapping
from functools import cache
from importlib.metadata import entry_points
from typing import Any

from k25_train.environments.adapters.registry import ADAPTED, ADAPTERS
from k25_train.environments.base import Task
from k25_train.environments.environment import Environment, MakeEnvironment, Services
from k25_train.environments.families.chores import Chores
from k25_train.environments.families.code import Code
from k25_train.environments.families.counting import Counting
from k25_train.environments.families.data import Data
from k25_train.environments.families.logic import Logic
from k25_train.environments.families.search import Search
from k25_train.environments.families.sums import Sums
from k25_train.environments.families.visual import Visual
from k25_train.environments.family import Family, Tasks
from k25_train.environments.one_turn import OneTurn
from k25_train.environments.tool_environment import ToolEnvironment
from k25_train.errors import ConfigError

FAMILIES: dict[str, Callable[[Mapping[str, str]], Family[Any]]] = {
    Sums.name: Sums,
    Counting.name: Counting,
    Logic.name: Logic,
    Code.name: Code,
    Data.name: Data,
    Visual.name: Visual,
    Search.name: Search,
    Chores.name: Chores,
}
"""Name in the configuration -> what makes it from its options."""
ONE_TURN = "one_turn"
"""The environment of tasks that are judged by the answer alone."""
ENVIRONMENTS: dict[str, MakeEnvironment] = {ONE_TURN: OneTurn, "tools": ToolEnvironment, **ADAPTED}
"""`Task.environment` -> what makes it."""


def make_family(name: str, options: Mapping[str, str] | None) -> Family[Any]:
    """The family of that name. Raises ConfigError for a name that is not known, and for its options."""
    make = FAMILIES.get(name) or _plug_in("k25_train.families", name)
    if make is None:
        raise ConfigError(
            f"family={name}: there is no such family of tasks\n"
            f"  -> use one of {', '.join((*FAMILIES, *ADAPTERS))}"
        )
    family: Family[Any] = make(options or {})
    return family


def make_tasks(name: str, options: Mapping[str, str] | None) -> Tasks:
    """The source of tasks of that name, a family or an adapter. Raises as `make_family`."""
    make = ADAPTERS.get(name)
    return make_family(name, options) if make is None else make(options or {})


def make_environment(task: Task, services: Services) -> Environment:
    """What the policy acts in for one attempt at a task. Raises ConfigError for a name that is not known, and
    whatever its maker does."""
    make = ENVIRONMENTS.get(task.environment) or _plug_in("k25_train.environments", task.environment)
    if make is None:
        raise ConfigError(
            f"task {task.key}: there is no environment {task.environment!r}\n"
            f"  -> use one of {', '.join(ENVIRONMENTS)}, or install the package that has it"
        )
    environment: Environment = make(task, services)
    return environment


@cache
def _plug_in(group: str, name: str) -> Any:
    """What an installed package declares; None if none does."""
    return next((each.load() for each in entry_points(group=group, name=name)), None)
