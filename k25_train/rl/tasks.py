"""Which task comes when: every task of a source once in each of its epochs, sources mixed by their weights.

    group number ─► source, by a pattern that repeats ─► how many of it came before ─► epoch, place in it
                                                                       keyed permutation of the epoch ─► task

All of it is arithmetic on the number of the group: the place in the order is the number of groups that were
admitted, which the journal knows, and a billion tasks take no memory.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import Any

import numpy as np

from k25_train.config.environment import EnvironmentConfig, TaskSourceConfig
from k25_train.data.mix.permutation import KeyedPermutation, key_of
from k25_train.environments.base import Task
from k25_train.environments.diversify.diversify import diversified
from k25_train.environments.family import Family, Finite, Split, Tasks
from k25_train.environments.instructions.instructions import instructed
from k25_train.environments.registry import ENVIRONMENTS, ONE_TURN, make_family, make_tasks
from k25_train.errors import ConfigError, RolloutError
from k25_train.rl.rewards.composite import with_rubrics

PATTERN = 1000
"""Groups after which the mixture repeats, where there are several sources: shares are rounded to its
thousandths. Our choice."""
SEED_BITS = 63
"""Of the seed of a response: what every engine takes as an integer."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Draw:
    """A task in its place."""

    task: Task
    """What is asked."""
    epoch: int
    """Which pass over its source this is, from 0."""
    source: str
    """Name of its source in `environment.tasks`."""


@dataclass(frozen=True, slots=True, kw_only=True)
class _Source:
    name: str
    config: TaskSourceConfig
    family: Tasks

    def task(self, split: Split, item: int) -> Task:
        """A task; one that rubrics judge as well has the judge that puts both together."""
        task = self.family.task(split, item)
        if self.config.agent and task.agent:
            raise ConfigError(
                f"environment.tasks.{self.name}.agent: tasks of {self.config.family} act by themselves\n"
                "  -> use agent: null"
            )
        if self.config.agent and task.environment in ENVIRONMENTS and task.environment != ONE_TURN:
            raise ConfigError(
                f"environment.tasks.{self.name}.agent: tasks of {self.config.family} are judged by what is "
                f"done in the environment {task.environment}, where the agent's command is not: all would "
                "earn 0\n"
                "  -> use agent: null, or a family whose tasks are judged by the answer"
            )
        if self.config.agent:
            task = replace(task, agent=tuple(self.config.agent), needs_sandbox=True)
        if self.config.diversify:
            task = diversified(task)
        if self.config.instructions:
            task = self._instructed(task)
        if not self.config.rubrics:
            return task
        if not task.judge:
            raise ConfigError(
                f"environment.tasks.{self.name}.rubrics: tasks of {self.config.family} are judged by their "
                "environment alone\n  -> leave rubrics out"
            )
        return replace(task, judge=with_rubrics(task.judge, self.name))

    def _instructed(self, task: Task) -> Task:
        if not task.judge:
            raise ConfigError(
                f"environment.tasks.{self.name}.instructions: tasks of {self.config.family} are judged by "
                "their environment alone\n  -> use instructions: 0"
            )
        return instructed(task, self.config.instructions)


def tasks_of(name: str, source: TaskSourceConfig) -> Tasks:
    """The tasks of `environment.tasks.NAME`. Raises `ConfigError` for a family that there is not, for its
    options, and where it has fewer tasks than are asked for."""
    try:
        tasks = make_tasks(source.family, source.options)
        if isinstance(tasks, Finite):
            tasks.check_sizes(source.num_tasks, source.num_heldout)
    except ConfigError as error:
        raise ConfigError(f"environment.tasks.{name}: {error}") from error
    return tasks


def family_of(name: str, source: TaskSourceConfig) -> Family[Any]:
    """The family of `environment.tasks.NAME`. Raises `ConfigError` for one that there is not, and for its
    options."""
    try:
        return make_family(source.family, source.options)
    except ConfigError as error:
        raise ConfigError(f"environment.tasks.{name}: {error}") from error


class TaskOrder:
    """The order of all tasks of a run, and those that are held out."""

    def __init__(self, config: EnvironmentConfig, seed: int) -> None:
        """Raises `ConfigError` for a family that does not exist, or its options."""
        self._seed = seed
        self._epochs = config.epochs
        used = {name: source for name, source in config.tasks.items() if source.weight}
        self._sources = [
            _Source(name=name, config=source, family=tasks_of(name, source))
            for name, source in sorted(used.items())
        ]
        self._pattern = _pattern([source.config.weight for source in self._sources])
        of_each = self._pattern[:, None] == np.arange(len(self._sources))
        self._counts = of_each.sum(0)
        """[sources]: how often each comes in a pattern."""
        self._before = of_each.cumsum(0) - of_each
        """[pattern, sources]: how often each came before a place."""

    def draw(self, number: int) -> Draw:
        """The task of group `number`. Raises `RolloutError` behind the last epoch."""
        source, place = self._place(number)
        epoch, position = divmod(place, source.config.num_tasks)
        if epoch >= self._epochs:
            raise RolloutError(
                f"group {number}: all {source.config.num_tasks:,} tasks of {source.name} were used "
                f"{self._epochs} times: raise environment.epochs or its num_tasks, or lower train.steps"
            )
        order = _order(source.config.num_tasks, key_of(self._seed, "tasks", source.name, epoch))
        item = int(order(np.array([position]))[0])
        return Draw(task=source.task(Split.TRAIN, item), epoch=epoch, source=source.name)

    def check_enough(self, num_groups: int) -> None:
        """Raise `ConfigError` if a run of so many groups would use tasks more often than it may."""
        for index, source in enumerate(self._sources):
            block, rest = divmod(num_groups, len(self._pattern))
            used = block * int(self._counts[index])
            used += int(self._before[rest, index]) if rest else 0
            most = self._epochs * source.config.num_tasks
            if used > most:
                raise ConfigError(
                    f"environment.epochs={self._epochs}: the run needs {used:,} tasks of {source.name}, "
                    f"which may give {source.config.num_tasks:,} x {self._epochs}\n"
                    "  -> raise environment.epochs or num_tasks, or lower train.steps"
                )

    def problems(self) -> Mapping[str, Sequence[int]]:
        """Problem -> numbers of its tasks, by which `numbered` makes them; reads every task once."""
        found: dict[str, list[int]] = {}
        for number, task in enumerate(self._all()):
            found.setdefault(task.problem or task.key, []).append(number)
        return found

    def numbered(self, number: int) -> Task:
        """The training task that `problems` has numbered so."""
        for source in self._sources:
            if number < source.config.num_tasks:
                return source.task(Split.TRAIN, number)
            number -= source.config.num_tasks
        raise IndexError(number)

    def heldout(self, num_tasks: int) -> list[Task]:
        """Held-out tasks, the sources in turn; fewer where there are not so many."""
        pairs = [
            (index, source)
            for index in range(max((each.config.num_heldout for each in self._sources), default=0))
            for source in self._sources
            if index < source.config.num_heldout
        ]
        return [source.task(Split.HELDOUT, index) for index, source in pairs[:num_tasks]]

    def probes(self, num_tasks: int) -> list[Task]:
        """Tasks for the probe of engines, the sources in turn: held-out ones, so none is trained on."""
        found = range(num_tasks)
        return [
            source.task(Split.HELDOUT, number // len(self._sources))
            for number in found
            for source in [self._sources[number % len(self._sources)]]
        ]

    def sampled(self, num_tasks: int) -> Iterator[Task]:
        """Tasks of each source, training and held-out ones, evenly spread: at most so many of each."""
        for source in self._sources:
            config = source.config
            for split, size in ((Split.TRAIN, config.num_tasks), (Split.HELDOUT, config.num_heldout)):
                step = max(1, -(-size // num_tasks))
                yield from (source.task(split, item) for item in range(0, size, step))

    def seed_of(self, task: str, epoch: int, sample: int, purpose: str = "train") -> int:
        """What all draws of one response depend on, with the token's position."""
        return key_of(self._seed, "response", purpose, task, epoch, sample) >> (64 - SEED_BITS)

    def _all(self) -> Iterator[Task]:
        for source in self._sources:
            yield from (source.task(Split.TRAIN, item) for item in range(source.config.num_tasks))

    def _place(self, number: int) -> tuple[_Source, int]:
        """The source of a group, and how many groups of it came before."""
        block, offset = divmod(number, len(self._pattern))
        index = int(self._pattern[offset])
        return self._sources[index], block * int(self._counts[index]) + int(self._before[offset, index])


@lru_cache(maxsize=16)
def _order(num_tasks: int, key: int) -> KeyedPermutation:
    return KeyedPermutation(num_tasks, key)


def _pattern(weights: Sequence[float]) -> np.ndarray:
    """[places] index of the source at each: the one furthest behind its share comes next."""
    if len(weights) == 1:
        return np.zeros(1, np.int64)
    shares = np.array(weights) / sum(weights)
    given = np.zeros(len(weights))
    pattern = np.empty(PATTERN, np.int64)
    for place in range(PATTERN):
        pattern[place] = np.argmax(shares * (place + 1) - given)
        given[pattern[place]] += 1
    return pattern
