"""What shards of tests do: a response of a few turns by the first rank's engines, without an environment."""

import asyncio
import os
from typing import Any

import numpy as np

from k25_train.environments.base import scored
from k25_train.errors import RolloutError
from k25_train.rollout.branches import Segment
from k25_train.rollout.engines.base import Request, Sampling
from k25_train.rollout.response_records import ended, extended, judged
from k25_train.rollout.shards.shard import Shard
from k25_train.rollout.trajectory import Ended
from k25_train.rollout.turns import ROOT, Place
from k25_train.rollout.work import Append, Work

BUILD = "tests.helpers.shard_job:build"
STOP = 250


class TurnsOnly:
    """See `Rollouts`: so many turns of so many tokens, one segment each."""

    def __init__(self, shard: Shard, num_turns: int, pause_s: float) -> None:
        self._shard, self._num_turns, self._pause_s = shard, num_turns, pause_s

    async def respond(self, work: Work, append: Append) -> None:
        if work.task.key == "broken":
            raise RolloutError("task broken: given up")
        if work.task.key == "deadly":
            os.kill(os.getpid(), 9)
        response = work.response
        while response.num_turns < self._num_turns:
            await asyncio.sleep(self._pause_s)
            branch = response.branches[0] if response.branches else None
            before = tuple(branch.token_ids.tolist()) if branch else ()
            seen = (work.group % 200, response.num_turns)
            request = Request(
                key=work.task.key,
                prompt_ids=(*before, *seen),
                sampling=Sampling(
                    max_tokens=8, temperature=1.0, seed=work.seed + response.num_turns, stop_ids=(STOP,),
                    forbidden_ids=(),
                ),
            )  # fmt: skip
            generated = await self._shard.engines.generate(request)
            segment = Segment(
                round=work.allowed.number,
                after=Place(0, len(before)) if branch else ROOT,
                observed_ids=np.array(seen, np.int32),
                media=(),
                token_ids=generated.token_ids,
                logprobs=generated.logprobs,
                spans=generated.spans,
                finish_reason=generated.finish_reason,
            )
            append(extended(work.group, work.sample, response, segment))
        append(ended(work.group, work.sample, response, Ended.STOP))
        append(judged(work.group, work.sample, scored(1.0, {})))

    async def announce(self, version: int) -> None:
        pass

    async def close(self) -> None:
        pass


async def build(shard: Shard, arguments: dict[str, Any]) -> TurnsOnly:
    return TurnsOnly(shard, arguments["turns"], arguments["pause_s"])
