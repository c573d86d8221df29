"""What planted faults are planted in: real rollouts on this event loop, and shards in processes."""

import asyncio
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Coroutine, Sequence
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import aiohttp
import numpy as np
from aiohttp import web

from k25_train.environments import registry
from k25_train.environments.base import Response, Task, Verdict, scored
from k25_train.environments.environment import Action, Judging, Observation, Services, Tool, ToolCall
from k25_train.environments.sandboxes.none import NoSandboxes
from k25_train.errors import K25Error
from k25_train.rollout.asking import Asking
from k25_train.rollout.engines.pool import EnginePool
from k25_train.rollout.local import LocalRollouts, Parts
from k25_train.rollout.manager.manager import RolloutManager
from k25_train.rollout.records import Record
from k25_train.rollout.response_records import apply_record
from k25_train.rollout.shards.link import FirstRankLink, local_address
from k25_train.rollout.shards.processes import ProcessStarter
from k25_train.rollout.shards.rollouts import ShardedRollouts
from k25_train.rollout.trajectory import Response as Rolled
from k25_train.rollout.work import Append, Rollouts, Round, Work
from tests.helpers.mock_rollouts import Echo
from tests.helpers.scripted_engine import ScriptedEngine
from tests.helpers.scripted_rollouts import PlainPrompts, rollout_config
from tests.helpers.shard_job import BUILD

STUCK_S = 3.0
"""`rollout.manager.stuck_s` of them all."""
TURNS = 5


@dataclass(slots=True)
class Log:
    """Lines with their times."""

    lines: list[tuple[float, str]] = field(default_factory=list)
    planted_at: float = 0.0
    """When the fault struck."""

    def tell(self, line: str) -> None:
        """Take a line."""
        self.lines.append((time.monotonic(), line))

    def strike(self) -> None:
        """A fault strikes now, unless it has before."""
        self.planted_at = self.planted_at or time.monotonic()

    def naming(self, words: Sequence[str]) -> tuple[float, str] | None:
        """Seconds from the fault to the first line that has all words, and that line; None without one."""
        for at, line in self.lines:
            if self.planted_at and at >= self.planted_at and all(word in line for word in words):
                return at - self.planted_at, line
        return None


class CallsPython(PlainPrompts):
    """Whatever is drawn is a call of a tool."""

    def action(self, token_ids: np.ndarray | Sequence[int], *, thinking: bool) -> Action:
        return Action(content="", calls=(ToolCall(id="functions.python:0", name="python", arguments={}),))


class Hangs:
    """See `Environment`: its tool never answers."""

    tools: tuple[Tool, ...] = ()
    is_replayable = True
    log: Log
    """Of the trial."""

    def __init__(self, task: Task, services: Services) -> None:
        pass

    async def reset(self) -> Observation:
        return Observation(messages=({"role": "user", "content": "?"},))

    async def step(self, action: Action) -> Observation:
        self.log.strike()
        await asyncio.Event().wait()
        raise AssertionError

    async def judge(self, response: Response) -> Verdict:
        return scored(1.0, {})

    async def close(self) -> None:
        pass


class Pleased:
    """Rewards whatever it sees."""

    async def judge(self, task: Task, response: Response) -> Verdict:
        return scored(1.0, {})


@dataclass(slots=True)
class AsksServer:
    """Asks a judge's server for its verdict."""

    url: str

    async def judge(self, task: Task, response: Response) -> Verdict:
        async with (
            aiohttp.ClientSession() as client,
            client.post(self.url, json={"response": response.text}) as answer,
        ):
            answer.raise_for_status()
            return scored(float(await answer.text()), {})


@asynccontextmanager
async def answering_500(log: Log) -> AsyncIterator[str]:
    """Within: a server that answers 500 to every request; its address."""

    async def answer(_: web.Request) -> web.Response:
        log.strike()
        return web.Response(status=500, text="out of memory")

    app = web.Application()
    app.router.add_post("/", answer)
    runner = web.AppRunner(app)
    await runner.setup()
    try:
        site = web.TCPSite(runner, "127.0.0.1", 0)
        await site.start()
        yield f"http://127.0.0.1:{runner.addresses[0][1]}/"
    finally:
        await runner.cleanup()


@asynccontextmanager
async def local(
    log: Log,
    *,
    judging: Judging | None = None,
    prompts: PlainPrompts | None = None,
    engines: Sequence[ScriptedEngine] = (),
) -> AsyncIterator[LocalRollouts]:
    """Within: rollouts on this event loop, whose engines have version 0."""
    config = rollout_config(max_tokens=64)
    config.manager = replace(config.manager, stuck_s=STUCK_S, teardown_timeout_s=1.0)
    pool = EnginePool.of(list(engines) or [ScriptedEngine()], 5.0)
    await pool.update([], 0)
    parts = Parts(
        asking=Asking(config, 256, pool, lambda _: None),
        prompts=prompts or PlainPrompts(),
        services=Services(sandboxes=NoSandboxes(), judging=judging or Pleased(), tool_timeout_s=60.0),
        manager=RolloutManager(config.manager, engines=pool, notice=log.tell),
        count=lambda _: None,
    )
    rollouts = LocalRollouts(config, parts)
    try:
        yield rollouts
    finally:
        await rollouts.close()


@dataclass(slots=True)
class Shards:
    """Two shards in processes."""

    link: FirstRankLink
    starter: ProcessStarter
    rollouts: ShardedRollouts


@asynccontextmanager
async def sharded(folder: Path, log: Log, pause_s: float) -> AsyncIterator[Shards]:
    """Within: shards whose turns take so many seconds."""
    pool = EnginePool.of([ScriptedEngine()], 5.0)
    await pool.update([], 0)
    link = FirstRankLink(local_address(folder))
    starter = ProcessStarter(link.address)
    begin = Record({"kind": "begin", "build": BUILD, "arguments": {"turns": TURNS, "pause_s": pause_s}})
    rollouts = ShardedRollouts(
        link, starter, 2, begin, pool, count=lambda _: None, notice=log.tell, stuck_s=STUCK_S
    )
    await rollouts.start()
    try:
        yield Shards(link, starter, rollouts)
    finally:
        await rollouts.close()


async def respond(rollouts: Rollouts, environment: str = "one_turn", append: Append | None = None) -> None:
    """Have response 0 of group 0, of task `files/7`, made."""
    task = Task(
        key="files/7", family="files", messages=(), judge="rubric", environment=environment,
        setup={"turns": TURNS},
    )  # fmt: skip
    response, media = Rolled(), dict[str, bytes]()
    work = Work(
        task=task, group=0, sample=0, seed=1, source="files", allowed=Round(number=0), response=response,
        media=media,
    )  # fmt: skip

    def take(record: Record) -> None:
        if append is not None:
            append(record)
        apply_record(record, response, media)

    await rollouts.respond(work, take)


async def until_named(log: Log, words: Sequence[str], work: Awaitable[None], limit_s: float) -> None:
    """Have work done until a line has the words, or so many seconds after the fault."""
    task = asyncio.ensure_future(work)
    while log.naming(words) is None:
        if log.planted_at and time.monotonic() - log.planted_at > limit_s:
            break
        # What ends without having met its fault, or being named, ends the wait too.
        if task.done() and not (log.planted_at and task.exception() is None):
            await asyncio.sleep(0.1)
            break
        await asyncio.sleep(0.02)
    task.cancel()
    with suppress(asyncio.CancelledError, K25Error):
        await task


def hanging(log: Log) -> str:
    """Name of an environment whose tool never answers."""
    Hangs.log = log
    registry.ENVIRONMENTS["hangs"] = Hangs
    return "hangs"


def talking() -> str:
    """Name of an environment that answers `TURNS` times."""
    registry.ENVIRONMENTS["echo"] = Echo
    return "echo"


Trial = Callable[[Path, Log], Coroutine[Any, Any, None]]
