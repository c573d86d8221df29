"""Families of generated tasks: any number of them, each a pure function of its number.

    number of the task ─► draw ─► content ─► digest ─► split ─► again until it is the split that was asked for

What is asked in a task decides its split, whatever its number: training and held-out tasks never ask the
same, however many there are.

Each family knows a way to solve every one of its tasks, and ways that must not pay: turns of an agent, which
can be played in the task's environment (`tests/unit/environments/test_solutions.py` does).
"""

import hashlib
import random
from abc import ABC, abstractmethod
from collections.abc import Callable, Collection, Mapping
from dataclasses import replace
from enum import StrEnum
from typing import Any, Protocol, runtime_checkable

from k25_train.environments.base import Task
from k25_train.environments.environment import Action, ToolCall
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


Script = tuple[Action, ...]
"""Turns of an agent in order, whatever it gets to see; the last one is its answer."""


class Family[Content](ABC):
    """Generates the tasks of one kind."""

    name: str
    """In configurations, and in figures."""
    wrong: float = 0.0
    """Share of the demonstrations that are cheats: whoever imitates them has something to gain."""

    @abstractmethod
    def draw(self, rng: random.Random) -> Content:
        """What is asked, as plain values whose `repr` tells them apart."""

    @abstractmethod
    def make(self, key: str, content: Content) -> Task:
        """The task that asks it."""

    @abstractmethod
    def solve(self, content: Content) -> Script:
        """Turns that earn a reward of 1."""

    @abstractmethod
    def cheats(self, content: Content) -> Mapping[str, Script]:
        """Name -> turns that are lazy, or cheat, and earn nothing."""

    def asked(self, content: Content) -> object:
        """What decides the split; the whole content, unless some of it is not asked."""
        return content

    def demonstrate(self, rng: random.Random, content: Content) -> Script:
        """One of the ways in which a demonstrator goes about it; `wrong` of them are cheats."""
        if rng.random() < self.wrong:
            cheats = self.cheats(content)
            return cheats[rng.choice(sorted(cheats))]
        return self.solve(content)

    def task(self, split: Split, number: int) -> Task:
        """Task `number`, 0 or more, of a split; the same whenever it is made."""
        return self.make(f"{self.name}/{split}/{number}", self.content(split, number))

    def demonstration(self, split: Split, number: int) -> Script:
        """How task `number` may be answered; the same whenever it is made."""
        rng = random.Random(f"demonstration {self.name} {split} {number}")
        return self.demonstrate(rng, self.content(split, number))

    def content(self, split: Split, number: int) -> Content:
        """What task `number` asks. Raises ConfigError where no draw is of the split."""
        rng = random.Random(f"task {self.name} {split} {number}")
        for _ in range(_MAX_DRAWS):
            content = self.draw(rng)
            if split_of(self.asked(content)) is split:
                return content
        raise ConfigError(
            f"{self.name}: none of {_MAX_DRAWS:,} draws is a {split} task\n"
            "  -> there are too few different ones: use wider options"
        )


def script(*turns: Action) -> Script:
    """Turns whose calls have the ids that a policy gives them: numbered through the conversation."""
    numbered, count = [], 0
    for turn in turns:
        calls = []
        for call in turn.calls:
            calls.append(replace(call, id=f"functions.{call.name}:{count}"))
            count += 1
        numbered.append(replace(turn, calls=tuple(calls)))
    return tuple(numbered)


def say(content: str, reasoning: str = "") -> Action:
    """A turn without calls: an answer."""
    return Action(content=content, reasoning=reasoning)


def call(tool: str, **arguments: Any) -> Action:
    """A turn that calls one tool."""
    return Action(content="", calls=(ToolCall(id="", name=tool, arguments=arguments),))


class Tasks(Protocol):
    """A source of tasks: a family that generates them, or what other systems have (`adapters`)."""

    def task(self, split: Split, number: int) -> Task:
        """Task `number`, 0 or more, of a split; the same whenever it is made."""


@runtime_checkable
class Finite(Tasks, Protocol):
    """A source that has only so many tasks."""

    def check_sizes(self, num_tasks: int, num_heldout: int) -> None:
        """Raise ConfigError where a configuration asks for more tasks than there are."""


def split_of(content: object) -> Split:
    """The split that a content belongs to, by its digest."""
    digest = hashlib.sha256(repr(content).encode()).digest()
    return Split.HELDOUT if int.from_bytes(digest[:8]) % HELDOUT_SHARE == 0 else Split.TRAIN


class Options:
    """What a configuration lets a family know, read once; all texts."""

    def __init__(self, family: str, given: Mapping[str, str]) -> None:
        self._family = family
        self._given = dict(given)
        self._taken: list[str] = []

    def take[T](self, name: str, default: str, read: Callable[[str], T], rule: str) -> T:
        """An option, or its default. Raises ConfigError, with the rule, where it cannot be read."""
        value = self._given.pop(name, default)
        self._taken.append(name)
        try:
            return read(value)
        except (ValueError, KeyError) as error:
            raise ConfigError(
                f"options.{name}={value} of the family {self._family}: {rule}\n  -> e.g. {name}: '{default}'"
            ) from error

    def names(self, name: str, known: Collection[str]) -> tuple[str, ...]:
        """An option that is some of the known names, separated by commas; all of them by default."""
        return self.take(name, ",".join(known), read_names(known), f"must be some of {', '.join(known)}")

    def difficulty(self, hardest: int) -> range:
        """`difficulty`: a range from 1, the easiest, to `hardest`; all of it by default."""

        def read(text: str) -> range:
            found = read_range(text)
            if found[-1] > hardest:
                raise ValueError(text)
            return found

        rule = f"must be a number of 1 to {hardest}, or a range such as 1-2"
        return self.take("difficulty", f"1-{hardest}", read, rule)

    def wrong(self) -> float:
        """`wrong`: the share of demonstrations that are cheats; none by default."""
        return self.take("wrong", "0", read_share, "must be between 0 and 1")

    def end(self) -> None:
        """Raises ConfigError for options that nobody took."""
        if self._given:
            known = ", ".join(self._taken) or "none"
            raise ConfigError(
                f"options of the family {self._family}: it has no {', '.join(sorted(self._given))}\n"
                f"  -> it has {known}; see `python -m k25_train.environments list`"
            )


def read_range(text: str) -> range:
    """`3-6`, both ends included, or one number; 1 or more. Raises ValueError."""
    first, _, last = text.partition("-")
    found = range(int(first), int(last or first) + 1)
    if not found or found[0] < 1:
        raise ValueError(text)
    return found


def read_names(known: Collection[str]) -> Callable[[str], tuple[str, ...]]:
    """What reads `a,b`, or one name, all of them known. It raises ValueError."""

    def read(text: str) -> tuple[str, ...]:
        names = tuple(name.strip() for name in text.split(","))
        if not set(names) <= set(known) or len(set(names)) < len(names):
            raise ValueError(text)
        return names

    return read


def read_share(text: str) -> float:
    """A number from 0 to 1. Raises ValueError."""
    found = float(text)
    if not 0 <= found <= 1:
        raise ValueError(text)
    return found


def user(content: Any) -> tuple[Mapping[str, Any], ...]:
    """A prompt of one message of the user."""
    return ({"role": "user", "content": content},)
