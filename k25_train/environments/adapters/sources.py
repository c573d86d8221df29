"""Tasks that are listed elsewhere, or that are seeds: what adapters give instead of families.

rows of a file, folders, tasks of a server ─► digest ─► train, or held out (one of eight)      `Listed`
seeds 0, 1, 2 … train;  2**30, 2**30 + 1 … are held out                                   `seeded_task`
"""

import json
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from functools import cached_property
from typing import Any

from k25_train.environments.adapters.messages import REWARDS
from k25_train.environments.base import Task
from k25_train.environments.family import Options, Split, split_of, user
from k25_train.errors import ConfigError

FIRST_HELDOUT_SEED = 1 << 30
"""Seeds from here on are of held-out tasks."""


class Listed[Row](ABC):
    """Tasks of a list. What is asked decides a task's split, so that a row that moves keeps it."""

    name: str
    """Of the adapter, in configurations."""

    @abstractmethod
    def rows(self) -> Sequence[Row]:
        """All of them, in order; read once. Raises ConfigError."""

    @abstractmethod
    def asked(self, row: Row) -> object:
        """What decides the split of a row."""

    @abstractmethod
    def make(self, key: str, row: Row) -> Task:
        """The task of a row."""

    def task(self, split: Split, number: int) -> Task:
        """Task `number` of a split. Raises ConfigError where there are fewer."""
        rows = self._splits[split]
        if number >= len(rows):
            raise ConfigError(
                f"{self.name}: {split} task {number:,} is asked for, and there are {len(rows):,} "
                f"(one of eight is held out)\n  -> lower num_tasks to {len(self._splits[Split.TRAIN]):,} and "
                f"num_heldout to {len(self._splits[Split.HELDOUT]):,}, or give it more tasks"
            )
        return self.make(f"{self.name}/{split}/{number}", rows[number])

    def check_sizes(self, num_tasks: int, num_heldout: int) -> None:
        """Raise ConfigError where a configuration asks for more tasks than there are."""
        for split, number in ((Split.TRAIN, num_tasks), (Split.HELDOUT, num_heldout)):
            if number:
                self.task(split, number - 1)

    @cached_property
    def _splits(self) -> dict[Split, list[Row]]:
        found: dict[Split, list[Row]] = {split: [] for split in Split}
        for row in self.rows():
            found[split_of(self.asked(row))].append(row)
        return found


def seed_of(split: Split, number: int) -> int:
    """The seed of task `number` of a split."""
    return number + (FIRST_HELDOUT_SEED if split is Split.HELDOUT else 0)


def seeded_task(
    environment: str,
    family: str,
    split: Split,
    number: int,
    *,
    prompt: str,
    setup: Mapping[str, Any],
    max_turns: int,
) -> Task:
    """Task `number` of a split, whose seed is all that tells it from others of its family."""
    return Task(
        key=f"{family}/{split}/{number}",
        family=family,
        messages=user(prompt),
        judge="",
        environment=environment,
        setup={**setup, "seed": seed_of(split, number)},
        problem=family,
        max_turns=max_turns,
        thinking=True,
    )


def reward_rule(given: Options) -> str:
    """The option `reward`: what becomes of the rewards of steps. Raises ConfigError."""
    return given.take("reward", "sum", one_of(*REWARDS), f"must be one of {', '.join(REWARDS)}")


def need(family: str, options: Mapping[str, str], name: str, example: str) -> None:
    """Raise ConfigError where an option is missing that has no default."""
    if name not in options:
        raise ConfigError(f"options of the family {family}: {name} is missing\n  -> e.g. {name}: '{example}'")


def one_of(*words: str) -> Callable[[str], str]:
    """Reads one of a few words. What it returns raises ValueError for others."""

    def read(text: str) -> str:
        if text not in words:
            raise ValueError(text)
        return text

    return read


def read_text(text: str) -> str:
    """A text that is not empty. Raises ValueError."""
    if not text.strip():
        raise ValueError(text)
    return text


def read_object(text: str) -> dict[str, Any]:
    """A JSON object. Raises ValueError."""
    found = json.loads(text)
    if type(found) is not dict:
        raise ValueError(text)
    return found


def read_url(text: str) -> str:
    """`http://HOST:PORT`, without a slash at its end. Raises ValueError."""
    if not text.startswith(("http://", "https://")) or len(text.split("/")) < 3 or not text.split("/")[2]:
        raise ValueError(text)
    return text.rstrip("/")


def read_urls(text: str) -> tuple[str, ...]:
    """Several of them, divided by commas. Raises ValueError."""
    return tuple(read_url(each.strip()) for each in text.split(","))


def read_seconds(text: str) -> float:
    """Seconds above 0. Raises ValueError."""
    found = float(text)
    if not 0 < found < float("inf"):
        raise ValueError(text)
    return found
