"""From a task to a judged response: tries until an engine has answered and a judge has judged, and no longer.

What fails is counted by its kind and tried again; after `rollout.max_attempts` tries in a row the run ends
with the task's name. Nothing is made up: no reward stands for a verdict that there is not.
"""

import asyncio
import math
from collections.abc import Awaitable, Callable
from functools import partial
from typing import Protocol

from k25_train.config.rollout import RolloutConfig
from k25_train.environments import base
from k25_train.environments.base import Status, Task, Verdict, unscored
from k25_train.errors import K25Error, RolloutError
from k25_train.rl.answers import wrong_with
from k25_train.rl.counts import Counts
from k25_train.rollout.engines.base import EngineError, FinishReason, Generated, Request, Sampling
from k25_train.rollout.engines.pool import EnginePool
from k25_train.rollout.prompts import Prompts
from k25_train.rollout.trajectory import Response, Segment
from k25_train.rollout.work import Round

FIRST_WAIT_S, LONGEST_WAIT_S = 0.05, 5.0
"""Between tries, doubled each time: an engine that starts again gets a little while. Our choice."""


class Judging(Protocol):
    """Judges any task; `rewards.judges.Judges` does."""

    async def judge(self, task: Task, response: base.Response) -> Verdict:
        """The verdict of the task's judge."""


class Responder:
    """Has engines answer and judges judge, one response at a time, any number at once."""

    def __init__(
        self,
        config: RolloutConfig,
        vocab_size: int,
        pool: EnginePool,
        prompts: Prompts,
        judges: Judging,
        counts: Counts,
    ) -> None:
        self._config = config
        self._vocab_size = vocab_size
        self._pool = pool
        self._prompts = prompts
        self._judges = judges
        self._counts = counts
        self._in_flight = self._being_judged = 0

    async def generate(
        self, task: Task, response: Response, seed: int, allowed: Round, add: Callable[[Segment], None]
    ) -> None:
        """Have a response go on until it ends, or has what the round allows.

        `add` is given each segment, and appends it to the response. Raises `RolloutError` if no engine gives
        a usable answer, `EngineError` if none is left.
        """
        prompt_ids = self._prompts.encode(task)
        while not response.is_finished:
            room = self._config.max_tokens - len(response.token_ids)
            if allowed.cap is not None:
                had = response.round_tokens if response.last_round == allowed.number else 0
                room = min(room, allowed.cap - had)
            if room <= 0:
                return
            request = self._request(task, prompt_ids, response, seed, room)
            generated = await self._tried(f"task {task.key}", partial(self._ask, request))
            reason = generated.finish_reason
            is_whole = len(response.token_ids) + len(generated.token_ids) >= self._config.max_tokens
            if reason is FinishReason.length and not is_whole:
                reason = FinishReason.aborted
            add(Segment.of(generated, allowed.number, reason))

    async def judge(self, task: Task, response: Response) -> Verdict:
        """The verdict on a response that has ended, scored or failed.

        Raises `RolloutError` where the judge gives none.
        """
        text = self._prompts.decode(response.token_ids)
        ended = response.finish_reason is FinishReason.stop
        whole = base.Response(text=text, num_tokens=len(response.token_ids), ended=ended)
        with self._counts.during("judge"):
            return await self._tried(
                f"task {task.key}, judge {task.judge}", lambda: self._judged(task, whole)
            )

    def _request(
        self, task: Task, prompt_ids: tuple[int, ...], response: Response, seed: int, room: int
    ) -> Request:
        return Request(
            key=f"{task.key}#{seed:x}",
            prompt_ids=prompt_ids,
            images=task.media,
            response_ids=tuple(response.token_ids.tolist()),
            sampling=Sampling(
                max_tokens=len(response.token_ids) + room,
                temperature=self._config.temperature,
                seed=seed,
                stop_ids=self._prompts.stop_ids,
                forbidden_ids=self._prompts.forbidden_ids,
            ),
        )

    async def _ask(self, request: Request) -> Generated:
        """One try. Raises `EngineError`, or `_AttemptError` for an answer that cannot be used."""
        serving = max(len(self._pool.serving), 1)
        self._in_flight += 1
        waves = math.ceil(self._in_flight / (self._config.max_running * serving))
        # Engines have a limit of their own; this one is for those that do not keep to it.
        limit_s = self._config.request_timeout_s * (waves + 1)
        try:
            async with asyncio.timeout(limit_s):
                generated = await self._pool.generate(request)
        except TimeoutError as error:
            raise _AttemptError("timeout", f"no answer within {limit_s:g} s") from error
        finally:
            self._in_flight -= 1
        if wrong := wrong_with(generated, request, self._vocab_size):
            kind, _, what = wrong.partition(": ")
            raise _AttemptError(kind, what)
        if len(generated.prompt_ids) > self._config.max_prompt_tokens:
            raise RolloutError(
                f"{request.key}: its prompt has {len(generated.prompt_ids)} tokens with its images, "
                f"rollout.max_prompt_tokens={self._config.max_prompt_tokens}: raise it, and train.seq_len "
                "with it, or leave the task out"
            )
        return generated

    async def _judged(self, task: Task, response: base.Response) -> Verdict:
        """One try. Raises `_AttemptError` for no verdict, or one that says that there is none."""
        self._being_judged += 1
        # Judges have a limit of their own for each; this one, for those that do not keep to it, holds even if
        # they judge one after another.
        limit_s = self._config.judge_timeout_s * (self._being_judged + 1)
        try:
            async with asyncio.timeout(limit_s):
                verdict = await self._judges.judge(task, response)
        except TimeoutError:
            verdict = unscored(f"judge timed out: no verdict within {limit_s:g} s (rollout.judge_timeout_s)")
        except Exception as error:
            # Whatever a judge raises is no verdict on the response.
            verdict = unscored(f"judge raised: {type(error).__name__}: {error}")
        finally:
            self._being_judged -= 1
        if verdict.status is Status.UNSCORED:
            raise _AttemptError(verdict.kind.replace(" ", "_"), verdict.reason)
        return verdict

    async def _tried[T](self, what: str, call: Callable[[], Awaitable[T]]) -> T:
        """What a call returns once it succeeds; `RolloutError` with all reasons after so many tries."""
        reasons: list[str] = []
        for attempt in range(self._config.max_attempts):
            if attempt:
                await asyncio.sleep(min(FIRST_WAIT_S * 2 ** (attempt - 1), LONGEST_WAIT_S))
            try:
                return await call()
            except _AttemptError as error:
                kind, why = error.kind, error.why
            except EngineError as error:
                if not self._pool.serving:
                    raise
                kind, why = "engine_error", str(error)
            self._counts.add(f"retried/{kind}")
            reasons.append(f"{kind}: {why}" if not why.startswith(kind) else why)
        raise RolloutError(
            f"{what}: given up after {len(reasons)} tries (rollout.max_attempts): {'; '.join(reasons)}. "
            "Nothing is lost: put right what failed, and start again"
        )


class _AttemptError(K25Error):
    """A try that came to nothing."""

    def __init__(self, kind: str, why: str) -> None:
        super().__init__(why)
        self.kind = kind
        self.why = why
