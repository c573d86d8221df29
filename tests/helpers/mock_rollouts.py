"""Whole rollouts without a model: sessions, records, an environment that echoes, a journal's state."""

import asyncio
from collections.abc import Callable
from dataclasses import replace

import numpy as np

from k25_train.environments import registry
from k25_train.environments.base import Response, Task, Verdict, scored
from k25_train.environments.environment import Action, Observation, Services, Tool
from k25_train.environments.sandboxes.none import NoSandboxes
from k25_train.rollout.asking import Asking
from k25_train.rollout.engines.base import FinishReason, Generated, Request, VersionSpan
from k25_train.rollout.local import LocalRollouts, Parts
from k25_train.rollout.manager.engines_seen import NoEngines
from k25_train.rollout.manager.manager import RolloutManager
from k25_train.rollout.response_records import apply_record
from k25_train.rollout.trajectory import Response as Rolled
from k25_train.rollout.work import Round, Work
from tests.helpers.scripted_rollouts import STOP, PlainPrompts, rollout_config

LATENCY_S = 0.005
AT_ONCE = 500


class BatchEngine:
    """Answers all that asked, `LATENCY_S` later: two tokens and the end of a turn."""

    num_serving = 1

    def __init__(self) -> None:
        self._asked: list[tuple[Request, asyncio.Future[Generated]]] = []

    async def generate(self, request: Request) -> Generated:
        answer: asyncio.Future[Generated] = asyncio.get_running_loop().create_future()
        self._asked.append((request, answer))
        return await answer

    async def run(self) -> None:
        while True:
            await asyncio.sleep(LATENCY_S)
            batch, self._asked = self._asked, []
            for first in range(0, len(batch), AT_ONCE):
                for request, answer in batch[first : first + AT_ONCE]:
                    answer.set_result(
                        Generated(
                            prompt_ids=np.array(request.prompt_ids, np.int32),
                            token_ids=np.array([17, 23, STOP], np.int32),
                            logprobs=np.array([-0.5, -0.5, -0.5], np.float32),
                            spans=(VersionSpan(0, 0, 3),),
                            finish_reason=FinishReason.stop,
                        )
                    )
                await asyncio.sleep(0)


class Echo:
    """See `Environment`: so many turns, each answered by a letter."""

    tools: tuple[Tool, ...] = ()
    is_replayable = True

    def __init__(self, task: Task, services: Services) -> None:
        self._left = int(task.setup["turns"])

    async def reset(self) -> Observation:
        return Observation(messages=({"role": "user", "content": "?"},))

    async def step(self, action: Action) -> Observation:
        self._left -= 1
        return Observation(messages=({"role": "user", "content": "x"},), done=self._left <= 0)

    async def judge(self, response: Response) -> Verdict:
        return scored(1.0, {})

    async def close(self) -> None:
        pass


class NobodyJudges:
    """Its tasks are judged by their environment."""

    async def judge(self, task: Task, response: Response) -> Verdict:
        raise AssertionError(task.key)


async def live(num_tasks: int, num_turns: int, notice: Callable[[str], None]) -> int:
    """Have so many rollouts live at once, whole; tokens of them all, drawn and observed."""
    registry.ENVIRONMENTS["echo"] = Echo
    config = rollout_config(max_tokens=8 * num_turns, max_running=num_tasks)
    config.manager = replace(config.manager, max_live=num_tasks, max_turns=num_turns)
    engine = BatchEngine()
    services = Services(sandboxes=NoSandboxes(), judging=NobodyJudges(), tool_timeout_s=10.0)
    manager = RolloutManager(config.manager, engines=NoEngines(), notice=notice)
    asking = Asking(config, 256, engine, lambda _: None)
    rollouts = LocalRollouts(
        config,
        Parts(
            asking=asking, prompts=PlainPrompts(), services=services, manager=manager, count=lambda _: None
        ),
    )
    answering = asyncio.create_task(engine.run())
    responses: list[Rolled] = []

    async def one(number: int) -> None:
        response, media = Rolled(), dict[str, bytes]()
        responses.append(response)
        task = Task(
            key=f"t/{number}", family="t", messages=(), judge="", environment="echo",
            setup={"turns": num_turns},
        )  # fmt: skip
        work = Work(
            task=task, group=number, sample=0, seed=number, source="s", allowed=Round(number=0),
            response=response, media=media,
        )  # fmt: skip
        await rollouts.respond(work, lambda record: apply_record(record, response, media))

    await asyncio.gather(*(one(number) for number in range(num_tasks)))
    answering.cancel()
    await rollouts.close()
    assert all(each.is_judged and each.num_turns == num_turns for each in responses)
    return sum(len(each.branches[0].token_ids) for each in responses)
