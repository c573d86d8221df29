"""Rollouts of tasks of several turns with a scripted engine: what a process does until it is killed."""

import asyncio
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from k25_train.environments import registry
from k25_train.environments.base import Response, Task, Verdict, scored
from k25_train.environments.environment import Action, Observation, Services, Tool, ToolCall
from k25_train.environments.sandboxes.none import NoSandboxes
from k25_train.rollout.agents import Agents, NoAgents
from k25_train.rollout.asking import Asking
from k25_train.rollout.branches import Branch
from k25_train.rollout.engines.pool import EnginePool
from k25_train.rollout.local import LocalRollouts, Parts
from k25_train.rollout.manager.manager import RolloutManager
from k25_train.rollout.records import Record
from k25_train.rollout.response_records import apply_record
from k25_train.rollout.trajectory import Response as Rolled
from k25_train.rollout.turns import Observed
from k25_train.rollout.work import Round, Work
from tests.helpers.scripted_engine import ScriptedEngine
from tests.helpers.scripted_rollouts import PlainPrompts, rollout_config

COUNTED = "counted"
"""Name of the environment."""


class KilledError(BaseException):
    """The process is gone."""


class TurnPrompts(PlainPrompts):
    """Messages as the letters of their contents; a turn calls a tool if its first id is even."""

    def following(self, task: str, messages: Any, media: Any, *, last_id: Any = None, **_: Any) -> Observed:
        return Observed((252, *"".join(str(each["content"]) for each in messages).encode(), 253), media)

    def action(self, token_ids: Any, *, thinking: bool) -> Action:
        text = self.decode(token_ids)
        if int(token_ids[0]) % 3 == 0:
            return Action(content=text, fault="malformed tool call: a third of all")
        calls = (ToolCall(id="functions.count:0", name="count", arguments={}),)
        return Action(content=text, calls=calls if int(token_ids[0]) % 2 == 0 else ())


@dataclass
class Counted:
    """Says how often it was asked and what with, until it has said so `setup["turns"]` times."""

    task: Task
    services: Services
    tools: tuple[Tool, ...] = ()
    said: list[str] = field(default_factory=list)
    is_closed: bool = False
    made: "list[Counted]" = field(default_factory=list)

    @property
    def is_replayable(self) -> bool:
        return bool(self.task.setup.get("replayable", True))

    async def reset(self) -> Observation:
        await self._maybe("reset")
        return Observation(messages=self.task.messages)

    async def step(self, action: Action) -> Observation:
        await self._maybe("step")
        self.said.append(action.content)
        done = len(self.said) >= self.task.setup["turns"]
        text = f"{len(self.said)} {action.content[:4]}" + str(self.task.setup.get("suffix", ""))
        return Observation(messages=({"role": "user", "content": text},), done=done)

    async def judge(self, response: Response) -> Verdict:
        await self._maybe("judge")
        assert len(self.said) in (len(response.messages) // 2, (len(response.messages) - 1) // 2)
        return scored(float(response.num_tokens), {"turns": float(len(self.said))})

    async def close(self) -> None:
        self.is_closed = True

    async def _maybe(self, method: str) -> None:
        """Fail, or take long, as often as the task says."""
        faults: list[Any] = self.task.setup.get("faults", {}).get(method, [])
        fault = faults.pop(0) if faults else None
        if isinstance(fault, float):
            await asyncio.sleep(fault)
        elif fault is not None:
            raise fault


def counted_task(turns: int, **setup: Any) -> Task:
    return Task(
        key="counted/0", family="counted", messages=({"role": "user", "content": "go"},), judge="own",
        environment=COUNTED, setup={"turns": turns, **setup},
    )  # fmt: skip


@dataclass
class Play:
    """One response, over the processes that it takes."""

    task: Task
    manager: dict[str, Any] = field(default_factory=dict)
    rollout: dict[str, Any] = field(default_factory=dict)
    agents: Agents = field(default_factory=NoAgents)
    records: list[Record] = field(default_factory=list)
    """The journal."""
    environments: list[Counted] = field(default_factory=list)
    counts: list[str] = field(default_factory=list)
    engine: ScriptedEngine = field(default_factory=ScriptedEngine)

    def process(self, rounds: Sequence[Round] = (Round(number=0),), dies_at: int | None = None) -> Rolled:
        """What a process makes of the journal; it dies before the record of that number."""
        response, media = Rolled(), dict[str, bytes]()
        for record in self.records:
            apply_record(record, response, media)

        def append(record: Record) -> None:
            if len(self.records) == dies_at:
                raise KilledError
            self.records.append(Record(dict(record.header), dict(record.arrays)))
            apply_record(record, response, media)

        def make(task: Task, services: Services) -> Counted:
            self.environments.append(Counted(task, services))
            return self.environments[-1]

        async def inside() -> None:
            rollouts = self._rollouts()
            try:
                for allowed in rounds:
                    work = Work(
                        task=self.task, group=0, sample=0, seed=7, source="counted", allowed=allowed,
                        response=response, media=media,
                    )  # fmt: skip
                    if not response.is_judged:
                        await rollouts.respond(work, append)
            finally:
                await rollouts.close()

        before = registry.ENVIRONMENTS.get(COUNTED)
        registry.ENVIRONMENTS[COUNTED] = make
        try:
            asyncio.run(inside())
        finally:
            registry.ENVIRONMENTS.pop(COUNTED, None)
            if before is not None:
                registry.ENVIRONMENTS[COUNTED] = before
        return response

    def _rollouts(self) -> LocalRollouts:
        config = rollout_config(**{"max_tokens": 200, **self.rollout})
        for name, value in self.manager.items():
            setattr(config.manager, name, value)
        self.engine.version = 3
        pool = EnginePool.of([self.engine], 5.0)
        pool.version = 3
        services = Services(sandboxes=NoSandboxes(), judging=None, tool_timeout_s=5.0)  # type: ignore[arg-type]
        parts = Parts(
            asking=Asking(config, 256, pool, self.counts.append),
            prompts=TurnPrompts(),
            services=services,
            manager=RolloutManager(config.manager, engines=pool, notice=lambda _: None),
            count=self.counts.append,
            agents=self.agents,
        )
        return LocalRollouts(config, parts)


def told_of(response: Rolled) -> tuple[Any, ...]:
    """All that trains, and what it is worth."""
    branches: list[Branch] = response.branches
    return (
        [each.token_ids.tolist() for each in branches],
        [each.own.tolist() for each in branches],
        [np.round(each.logprobs, 6).tolist() for each in branches],
        response.ended,
        response.verdict,
        response.num_calls,
        response.num_unread,
    )
