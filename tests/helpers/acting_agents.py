"""An agent's command in a real sandbox, before a gateway whose engine says what a test wants."""

import asyncio
from collections.abc import Awaitable
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from k25_train.environments.base import Task
from k25_train.environments.environment import Observation
from k25_train.environments.sandboxes.base import SandboxLimits
from k25_train.environments.sandboxes.opening import open_sandboxes
from k25_train.rollout.agents import Acted
from k25_train.rollout.gateway.agents import GatewayAgents
from tests.helpers.gateway_parts import Says, Stage, gateway_stage
from tests.helpers.rollout_sections import manager_section

LIMITS = SandboxLimits(
    cpus=1.0, memory_bytes=2**30, disk_bytes=2**26, processes=64, output_bytes=2**20, ttl_s=600
)
OPENING = Observation(messages=({"role": "user", "content": "What is in {model}?"},))


class PlainScope:
    """What agents need of a scope."""

    async def teardown(self, closing: Awaitable[None], what: str) -> None:
        await closing


def act(
    folder: Path, command: tuple[str, ...], says: Says, fails: bool = False, limit_s: float = 60.0
) -> tuple[Acted, Stage, Any]:
    """Have an agent act, in an attempt that may take so many seconds."""

    async def acted() -> tuple[Acted, Stage, Any]:
        async with gateway_stage(folder, says) as stage, asyncio.timeout(60):
            stage.engine.fails = fails
            trial = stage.open()
            boxes = open_sandboxes("bubblewrap", LIMITS, run="test", most=2, secret=())
            section = replace(manager_section(), rollout_timeout_s=limit_s)
            agents = GatewayAgents(stage.prompts, boxes, section, stage.counts.append)
            task = Task(key="task 7", family="f", messages=OPENING.messages, judge="j", agent=command)
            recorded: Any = trial.recorded
            nothing: Any = SimpleNamespace()
            scope: Any = PlainScope()
            try:
                async with asyncio.timeout(limit_s):
                    found = await agents.act(task, nothing, OPENING, recorded, scope)
                assert stage.mismatches([trial]) == []
                return found, stage, trial
            finally:
                await agents.close()
                await boxes.close()

    return asyncio.run(acted())
