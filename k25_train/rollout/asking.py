"""Engines are asked until one gives an answer that can be trained on; nothing is made up."""

import asyncio
import math
from functools import partial
from typing import Protocol

import numpy as np

from k25_train.config.rollout import RolloutConfig
from k25_train.rollout.answers import wrong_with
from k25_train.rollout.engines.base import Generated, Request
from k25_train.rollout.tries import AttemptError, Count, tried


class Generates(Protocol):
    """Engines as one; `engines/pool.py` is one."""

    @property
    def num_serving(self) -> int:
        """Engines that get requests."""

    async def generate(self, request: Request) -> Generated:
        """Generate one response, or go on with it. Raises `EngineError`."""


class Asking:
    """Asks engines, any number of requests at once."""

    def __init__(self, config: RolloutConfig, vocab_size: int, engines: Generates, count: Count) -> None:
        """`vocab_size`: ids that the model can generate."""
        self.config = config
        """Limits of requests."""
        self._vocab_size = vocab_size
        self._engines = engines
        self._count = count
        self._in_flight = 0

    async def ask(self, request: Request, expanded: np.ndarray) -> Generated:
        """An answer that can be trained on.

        `expanded`: [P] int32, the prompt as the engine has to have seen it, with every placeholder. Raises
        `RolloutError` if no engine gives one, `EngineError` if none is left.
        """
        return await tried(
            f"task {request.key.partition('#')[0]}",
            partial(self._ask, request, expanded),
            max_attempts=self.config.max_attempts,
            count=self._count,
            is_hopeless=lambda: not self._engines.num_serving,
        )

    async def _ask(self, request: Request, expanded: np.ndarray) -> Generated:
        """One try. Raises `EngineError`, or `AttemptError` for an answer that cannot be used."""
        self._in_flight += 1
        waves = math.ceil(self._in_flight / (self.config.max_running * max(self._engines.num_serving, 1)))
        # Engines have a limit of their own; this one is for those that do not keep to it.
        limit_s = self.config.request_timeout_s * (waves + 1)
        try:
            async with asyncio.timeout(limit_s):
                generated = await self._engines.generate(request)
        except TimeoutError as error:
            raise AttemptError("timeout", f"no answer within {limit_s:g} s") from error
        finally:
            self._in_flight -= 1
        if wrong := wrong_with(generated, request, self._vocab_size):
            kind, _, what = wrong.partition(": ")
            raise AttemptError(kind, what)
        if not np.array_equal(generated.prompt_ids, expanded):
            seen = len(generated.prompt_ids)
            what = f"it has seen {seen} ids, which are not the {len(expanded)} of the prompt"
            raise AttemptError("other_prompt", what)
        return generated
