"""Shards as the first rank knows them: which work each has, and when it was heard of."""

import asyncio
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from itertools import islice
from typing import Any, Protocol

from k25_train.rollout.manager.roll_call import GIVEN
from k25_train.rollout.work import Append, Work

NUM_EXAMPLES = 3
"""Responses that are named where many are concerned."""
NOBODY = -1
"""In the place of an incarnation."""


class Starter(Protocol):
    """Starts and ends shards; `processes.py` and `ray_actors.py` have one each."""

    async def start(self, shard: int, incarnation: int, name: str) -> None:
        """Start a shard that connects under this name."""

    def is_dead(self, shard: int) -> str:
        """Why it is; empty if it lives as far as one knows."""

    async def end(self, shard: int, within_s: float) -> None:
        """End it: by itself, if it does so within a time. Twice is as once."""


@dataclass(slots=True)
class Given:
    """Work that a shard is to do."""

    work: Work
    append: Append
    done: "asyncio.Future[None]"
    sent_to: int = NOBODY
    """Incarnation of the shard that has it."""
    deaths: int = 0
    """Of shards that had it."""
    latest: str = GIVEN
    """Kind of its latest record."""

    @property
    def name(self) -> str:
        """What the response is called."""
        return f"{self.work.task.key}#{self.work.sample}"

    @property
    def where(self) -> str:
        """Name, group and how far it has come, for messages."""
        return f"{self.name} of group {self.work.group} behind phase {self.latest}"


@dataclass(slots=True)
class Member:
    """One shard."""

    number: int
    """Which."""
    incarnation: int = 0
    """Times that it was started again."""
    given: dict[int, Given] = field(default_factory=dict)
    """Number -> work that it is to do."""
    has: frozenset[int] = frozenset()
    """Numbers of the work that it said to have with its latest sign of life."""
    heard: float = 0.0
    """When the latest sign of life came."""
    is_there: bool = False
    """Whether it has said hello, and was told what it is built from."""
    deaths: int = 0
    """Deaths in a row, without a response between them."""
    figures: Mapping[str, Any] = field(default_factory=dict)
    """What its latest sign of life said."""

    @property
    def name(self) -> bytes:
        """By which it is connected."""
        return f"shard {self.number}.{self.incarnation}".encode()

    def interrupted(self) -> str:
        """What it is in the middle of, for messages: how many responses, and the first few of them."""
        examples = ", ".join(each.where for each in islice(self.given.values(), NUM_EXAMPLES))
        number = len(self.given)
        return f"{number:,} response{'' if number == 1 else 's'}" + (f" ({examples})" if examples else "")

    def begin_again(self, heard: float) -> None:
        """Another incarnation is started."""
        for given in self.given.values():
            given.deaths += given.sent_to == self.incarnation
        self.deaths += 1
        self.incarnation += 1
        self.is_there, self.heard, self.has, self.figures = False, heard, frozenset(), {}

    def tells(self, figures: Mapping[str, Any], count: Callable[[str], None]) -> None:
        """Take a sign of life in: what has happened in it since the one before counts."""
        before = self.figures.get("counts", {})
        for kind, number in figures.get("counts", {}).items():
            for _ in range(number - before.get(kind, 0)):
                count(kind)
        self.figures = figures

    def known(self) -> Iterator[str]:
        """Names of the work that is not lost: it has it, or was not sent it yet."""
        for number, given in self.given.items():
            if number in self.has or given.sent_to != self.incarnation or not self.is_there:
                yield given.name
