"""Families of generated tasks: any number of them, each a pure function of its number.

    number of the task ─► draw ─► content ─► digest ─► split ─► again until it is the split that was asked for

What is asked in a task decides its split, whatever its number: training and held-out tasks never ask the
same, however many there are.
"""

import hashlib
import random
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from enum import StrEnum
from typing import Any

from k25_train.environments.base import Task
from k25_train.errors import ConfigError

HELDOUT_SHARE = 8
"""One of so many contents is held out. Our choice."""
_MAX_DRAWS = 10_000


class Split(StrEnum):
    """What a task is for."""

    TRAIN = "train"
    """To be trained on."""
    HELDOUT = "heldout"
    """To be evaluated on."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Demonstration:
    """How a task may be answered: what fine-tuning before reinforcement learning shows."""

    reasoning: str
    """What is thought first; empty for nothing."""
    content: str
    """The answer."""


class Family[Content](ABC):
    """Generates the tasks of one kind."""

    name: str
    """In configurations, and in figures."""

    @abstractmethod
    def draw(self, rng: random.Random) -> Content:
        """What is asked, as plain values whose `repr` tells them apart."""

    @abstractmethod
    def make(self, key: str, content: Content) -> Task:
        """The task that asks it."""

    @abstractmethod
    def explain(self, rng: random.Random, content: Content) -> Demonstration:
        """One of the ways in which a demonstrator answers it."""

    def task(self, split: Split, number: int) -> Task:
        """Task `number`, 0 or more, of a split; the same whenever it is made."""
        return self.make(f"{self.name}/{split}/{number}", self._content(split, number))

    def demonstration(self, split: Split, number: int) -> Demonstration:
        """How task `number` may be answered; the same whenever it is made."""
        rng = random.Random(f"demonstration {self.name} {split} {number}")
        return self.explain(rng, self._content(split, number))

    def _content(self, split: Split, number: int) -> Content:
        rng = random.Random(f"task {self.name} {split} {number}")
        for _ in range(_MAX_DRAWS):
            content = self.draw(rng)
            if split_of(content) is split:
                return content
        raise ConfigError(
            f"{self.name}: none of {_MAX_DRAWS:,} draws is a {split} task\n"
            "  -> there are too few different ones: use wider options"
        )


def split_of(content: object) -> Split:
    """The split that a content belongs to, by its digest."""
    digest = hashlib.sha256(repr(content).encode()).digest()
    return Split.HELDOUT if int.from_bytes(digest[:8]) % HELDOUT_SHARE == 0 else Split.TRAIN


class Options:
    """What a configuration lets a family know, read once; all texts."""

    def __init__(self, family: str, given: Mapping[str, str]) -> None:
        self._family = family
        self._given = dict(given)

    def take[T](self, name: str, default: str, read: Callable[[str], T], rule: str) -> T:
        """An option, or its default. Raises ConfigError, with the rule, where it cannot be read."""
        value = self._given.pop(name, default)
        try:
            return read(value)
        except (ValueError, KeyError) as error:
            raise ConfigError(
                f"options.{name}={value} of the family {self._family}: {rule}\n  -> e.g. {name}: '{default}'"
            ) from error

    def end(self) -> None:
        """Raises ConfigError for options that nobody took."""
        if self._given:
            raise ConfigError(
                f"options of the family {self._family}: it has no {', '.join(sorted(self._given))}\n"
                "  -> leave them out; k25_train/environments has what there is"
            )


def read_range(text: str) -> range:
    """`3-6`, both ends included, or one number; 1 or more. Raises ValueError."""
    first, _, last = text.partition("-")
    found = range(int(first), int(last or first) + 1)
    if not found or found[0] < 1:
        raise ValueError(text)
    return found


def read_share(text: str) -> float:
    """A number from 0 to 1. Raises ValueError."""
    found = float(text)
    if not 0 <= found <= 1:
        raise ValueError(text)
    return found


def user(content: Any) -> tuple[Mapping[str, Any], ...]:
    """A prompt of one message of the user."""
    return ({"role": "user", "content": content},)
