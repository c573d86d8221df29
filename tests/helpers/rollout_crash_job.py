"""What is killed in tests.bench.rollout_crashes: a first rank that hands out walks and consumes them.

    python -m tests.helpers.rollout_crash_job FOLDER NUM_STEPS PER_STEP URL...

It has the journal, the pool of engine servers and two shards in processes, as a run has them; in the place of
the trainer is a file for each step. A walk is a task of several turns, a tool call of a few milliseconds
behind each: how many follows from what the policy draws, with a long tail. Odd ones cannot be replayed.
"""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
import json
import os
import sys
import tempfile
import zlib
from collections import Counter
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from k25_train.config.rollout import RolloutConfig
from k25_train.data.mix.permutation import key_of
from k25_train.environments import registry
from k25_train.environments.base import Response as Answer
from k25_train.environments.base import Task, Verdict, scored
from k25_train.environments.environment import Action, Observation, Services
from k25_train.environments.sandboxes.none import NoSandboxes
from k25_train.errors import RolloutError
from k25_train.export.stream import NamedTensor
from k25_train.rl.controller import Controller
from k25_train.rl.counts import Counts
from k25_train.rl.tasks import Draw
from k25_train.rl.toggle import NoToggle
from k25_train.rollout.asking import Asking
from k25_train.rollout.engines.base import EngineError
from k25_train.rollout.engines.pool import EnginePool
from k25_train.rollout.engines.served_model import ServedModel
from k25_train.rollout.engines.vllm.client import connect_vllm
from k25_train.rollout.engines.wire import HttpLimits
from k25_train.rollout.journal import Journal
from k25_train.rollout.journal_state import consumed
from k25_train.rollout.local import LocalRollouts, Parts
from k25_train.rollout.manager.engines_seen import NoEngines
from k25_train.rollout.manager.manager import RolloutManager
from k25_train.rollout.records import Record
from k25_train.rollout.shards.link import FirstRankLink, local_address
from k25_train.rollout.shards.processes import ProcessStarter
from k25_train.rollout.shards.rollouts import ShardedRollouts
from k25_train.rollout.shards.shard import Shard
from k25_train.rollout.trajectory import Group
from tests.helpers.scripted_rollouts import PlainPrompts, algorithm_config, rollout_config

SEED, SHARDS, STALENESS = 11, 2, 2
MOST_TURNS = 12
TOOL_S = 0.01
NO_ENGINE = 3
"""Exit status of a job that all engines had left at once."""
REBUILD_S = 0.2
PAD = 255
"""Id of images' placeholders, of which there are none."""


class Walk:
    """See `Environment`: it goes on until a turn's digest says that it is over."""

    tools = ()

    def __init__(self, task: Task, services: Services) -> None:
        self._number = int(task.key.removeprefix("walk"))
        self._turns = 0

    @property
    def is_replayable(self) -> bool:
        return self._number % 2 == 0

    async def reset(self) -> Observation:
        return Observation(messages=({"role": "user", "content": f"walk {self._number}"},))

    async def step(self, action: Action) -> Observation:
        self._turns += 1
        await asyncio.sleep(TOOL_S * (1 + self._number % 4))
        digest = hashlib.sha256(f"{self._number} {action.content}".encode()).digest()
        if digest[0] < 64:
            return Observation(done=True)
        return Observation(messages=({"role": "user", "content": f"step {digest[1] % 10}"},))

    async def judge(self, response: Answer) -> Verdict:
        return scored(float(response.num_tokens % 2), {})

    async def close(self) -> None:
        pass


class Walks:
    """Tasks in order; in the place of `TaskOrder`."""

    def draw(self, number: int) -> Draw:
        task = Task(
            key=f"walk{number}", family="walk", messages=(), judge="walk", environment="walk",
            max_turns=MOST_TURNS,
        )  # fmt: skip
        return Draw(task=task, epoch=0, source="walks")

    def seed_of(self, task: str, epoch: int, sample: int, purpose: str = "train") -> int:
        return seed_of(task, sample)


class NoJudges:
    """Walks judge themselves."""

    async def judge(self, task: Task, response: Answer) -> Verdict:
        raise AssertionError(task.key)


def seed_of(task: str, sample: int) -> int:
    """What draws depend on."""
    return key_of(SEED, task, sample) >> 1


def weights_of(version: int) -> list[NamedTensor]:
    """Weights of a version: other ones draw other tokens."""
    return [NamedTensor("w", torch.tensor([version, version * 7 + 1]))]


def crc_of(version: int) -> int:
    """What `ScriptedEngine` makes of them."""
    return zlib.crc32(weights_of(version)[0].tensor.numpy().tobytes())


def settings() -> RolloutConfig:
    """Of jobs and their shards."""
    config = rollout_config(
        max_tokens=400, max_attempts=10, max_running=64, request_timeout_s=20.0, update_timeout_s=10.0
    )
    manager = replace(config.manager, max_turns=MOST_TURNS, max_live=100, max_restarts=20)
    return replace(config, manager=manager)


async def build(shard: Shard, arguments: dict[str, Any]) -> LocalRollouts:
    """What a shard works with."""
    registry.ENVIRONMENTS["walk"] = Walk
    config, counts = settings(), Counter[str]()

    def count(kind: str) -> None:
        counts[kind] += 1

    parts = Parts(
        asking=Asking(config, 256, shard.engines, count),
        prompts=PlainPrompts(),
        services=Services(sandboxes=NoSandboxes(), judging=NoJudges(), tool_timeout_s=10.0),
        manager=RolloutManager(config.manager, engines=NoEngines(), notice=shard.notice),
        count=count,
    )
    return LocalRollouts(config, parts)


def step_file(folder: Path, step: int) -> Path:
    """What a step was given."""
    return folder / f"step_{step}.json"


class Job:
    """A first rank."""

    def __init__(self, folder: Path, num_steps: int, per_step: int) -> None:
        self._folder, self._num_steps = folder, num_steps
        self._journal = Journal(
            folder / "journal",
            has_data=lambda step: step_file(folder, step).exists(),
            notice=lambda text: print(text, flush=True),
        )
        self._algorithm = algorithm_config(
            prompts_per_step=per_step, group_size=1, max_staleness=STALENESS, steps_per_rollout=1
        )

    async def run(self, urls: Sequence[str]) -> None:
        """Take and consume what is left."""
        model = ServedModel(vocab_size=256, media_pad=PAD, vision=None)
        limits = HttpLimits.of(settings())
        engines = [await self._connected(url, model, limits) for url in urls]
        pool, counts = EnginePool.of(engines, 5.0), Counts()
        link = FirstRankLink(local_address(Path(tempfile.mkdtemp(dir=self._folder))))
        begin = {"kind": "begin", "build": "tests.helpers.rollout_crash_job:build", "arguments": {}}
        rollouts = ShardedRollouts(
            link, ProcessStarter(link.address), SHARDS, Record(begin), pool, count=counts.add,
            notice=lambda text: print(text, flush=True), stuck_s=2.0,
        )  # fmt: skip
        controller = Controller(
            self._algorithm, self._num_steps, Walks(), self._journal, pool, rollouts, counts  # type: ignore[arg-type]
        )  # fmt: skip
        await rollouts.start()
        mending = asyncio.create_task(_mend(pool))
        try:
            await self._steps(pool, rollouts, controller)
        finally:
            mending.cancel()
            await controller.close()
            await rollouts.close()
            await pool.close()
            self._journal.close()

    async def _steps(self, pool: EnginePool, rollouts: ShardedRollouts, controller: Controller) -> None:
        per_step = self._algorithm.prompts_per_step
        for step in range(self._journal.state.num_consumed // per_step + 1, self._num_steps + 1):
            await pool.update(weights_of(step - 1), step - 1)
            await rollouts.announce(step - 1)
            controller.pushed()
            groups = await controller.take(step, NoToggle())
            self._consume(step, groups)

    def _consume(self, step: int, groups: Sequence[Group]) -> None:
        # What a step is made of is on disk before the journal says so, as with step files.
        path = step_file(self._folder, step)
        scratch = path.with_suffix(".new")
        scratch.write_text(json.dumps([_told(group) for group in groups]), encoding="ascii")
        os.replace(scratch, path)
        self._journal.append(consumed(step, tuple(group.number for group in groups)))
        self._journal.flush()

    async def _connected(self, url: str, model: ServedModel, limits: HttpLimits) -> Any:
        """An engine's client; it may have been killed a moment ago."""
        for _ in range(100):
            with contextlib.suppress(EngineError):
                return await connect_vllm(url, model, limits)
            await asyncio.sleep(0.2)
        raise EngineError(f"{url}: does not come back")


async def _mend(pool: EnginePool) -> None:
    while True:
        await asyncio.sleep(REBUILD_S)
        await pool.rebuild()


def _told(group: Group) -> dict[str, Any]:
    (response,) = group.responses
    (branch,) = response.branches
    return {
        "group": group.number,
        "task": group.task,
        "attempt": response.attempt,
        "turns": response.num_turns,
        "tokens": branch.token_ids.tolist(),
        "logprobs": branch.logprobs.tolist(),
        "versions": branch.versions.tolist(),
    }


def main() -> int:
    """See the head of this file."""
    folder, num_steps, per_step, *urls = sys.argv[1:]
    try:
        asyncio.run(Job(Path(folder), int(num_steps), int(per_step)).run(urls))
    except (EngineError, RolloutError) as error:
        print(f"{type(error).__name__}: {error}", flush=True)
        return NO_ENGINE
    return 0


if __name__ == "__main__":
    sys.exit(main())
