"""A rollout manager with a clock that does not move, and engines that are whatever a test says."""

import asyncio
from collections.abc import Awaitable, Callable, Coroutine
from dataclasses import dataclass, field, replace
from typing import Any

from k25_train.rollout.engines.base import EngineState
from k25_train.rollout.manager.manager import RolloutManager
from k25_train.rollout.manager.scope import Scope
from tests.helpers.rollout_sections import manager_section

STUCK_S = 80.0
"""On the manager's clock: real ticks, a second long, come too late for a test."""


@dataclass(slots=True)
class SaidEngines:
    """Engines that are as a test says."""

    version: int = -1
    said: dict[str, EngineState] = field(default_factory=dict)
    lost: dict[str, str] = field(default_factory=dict)

    async def states(self) -> dict[str, EngineState]:
        return self.said

    def fenced(self) -> dict[str, str]:
        return self.lost


@dataclass
class Managed:
    """A manager, and all that it said."""

    changes: dict[str, Any] = field(default_factory=dict)
    engines: SaidEngines = field(default_factory=SaidEngines)
    lines: list[str] = field(default_factory=list)
    now: float = 1000.0
    manager: RolloutManager = field(init=False)

    def __post_init__(self) -> None:
        values = {"stuck_s": STUCK_S, "rollout_timeout_s": 1000.0, "max_restarts": 0} | self.changes
        config = replace(manager_section(), **values)
        self.manager = RolloutManager(
            config, engines=self.engines, notice=self.lines.append, clock=lambda: self.now
        )

    def start(
        self,
        name: str,
        work: Callable[[Scope], Awaitable[Any]],
        *,
        source: str = "sums",
        order: int = 0,
        needs_sandbox: bool = False,
    ) -> "asyncio.Task[Any]":
        """Have a rollout begin in a task of its own."""
        call: Coroutine[Any, Any, Any] = self.manager.run(
            name, work, source=source, order=order, needs_sandbox=needs_sandbox
        )
        return asyncio.ensure_future(call)

    async def pass_s(self, seconds: float) -> None:
        """So many seconds pass, and the manager looks at what is due."""
        await turns()
        self.now += seconds
        await self.manager.sweep()
        await self.manager.ask_engines()
        await turns()


async def turns(number: int = 5) -> None:
    """Some turns of the event loop."""
    for _ in range(number):
        await asyncio.sleep(0)
