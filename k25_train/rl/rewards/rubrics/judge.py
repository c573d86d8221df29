"""Has a model score an answer by a set of rubrics, over any engine.

    answer ─► cached? ─► version as pinned? ─► ask ─► readable? ─► scores ─► cache
                              │ no                      │ no, a few times: ask again
                              ▼                         ▼
                          unscored                   unscored

Whatever goes wrong here is the judge's fault, so the verdict has no reward, and says what it was.
"""

import asyncio
from collections.abc import Mapping, Sequence
from typing import Any, Protocol

from k25_train.environments.base import Task, Verdict, scored, unscored
from k25_train.rl.rewards.answer import Answer
from k25_train.rl.rewards.rubrics.cache import RubricCache, cache_key
from k25_train.rl.rewards.rubrics.rubric import (
    HIGHEST,
    RubricSet,
    UnreadableReplyError,
    ask,
    ask_again,
    read_reply,
    total,
)


class ChatEngine(Protocol):
    """What rubrics are judged with: any model that answers messages. `EngineChat` makes one of an engine."""

    async def version(self) -> str:
        """Names the weights that it answers with now."""

    async def generate(self, messages: Sequence[Mapping[str, Any]]) -> str:
        """The reply to messages."""


class RubricJudge:
    """Scores answers by one set of rubrics; a `RubricCheck` of `composite.py`."""

    def __init__(
        self,
        rubric: RubricSet,
        engine: ChatEngine,
        *,
        version: str,
        cache: RubricCache,
        attempts: int,
        timeout_s: float,
    ) -> None:
        """Judges by a rubric.

        Args:
            rubric: what is asked.
            engine: who is asked.
            version: of its weights, pinned: another judge would give the same answer another reward.
            cache: scores that were given before.
            attempts: replies until one can be read.
            timeout_s: seconds for each.
        """
        self._rubric = rubric
        self._engine = engine
        self._version = version
        self._cache = cache
        self._attempts = attempts
        self._timeout_s = timeout_s

    async def __call__(self, task: Task, answer: Answer) -> Verdict:
        """The weighted mean of the scores, 0 to 1, each a part of the verdict; or `unscored`."""
        name = self._rubric.name
        key = cache_key(self._rubric, self._version, task, answer.content)
        scores = self._cache.get(key)
        if scores is None:
            try:
                scores = await self._asked(task, answer.content)
            except TimeoutError:
                return unscored(f"rubric timed out: {name} had no reply in {self._timeout_s:g} s")
            except _WrongVersionError as error:
                return unscored(f"rubric of another version: {name}: {error}")
            except UnreadableReplyError as error:
                return unscored(f"rubric unreadable: {name}: {self._attempts} replies, the last one: {error}")
            except Exception as error:
                return unscored(f"rubric raised: {name}: {type(error).__name__}: {error}")
            self._cache.put(key, scores)
        parts = {f"{name}/{criterion}": score / HIGHEST for criterion, score in scores.items()}
        score = total(self._rubric, scores)
        return scored(score, {name: score, **parts})

    async def _asked(self, task: Task, content: str) -> dict[str, int]:
        messages = ask(self._rubric, task, content)
        why = UnreadableReplyError("it was never asked")
        for _ in range(self._attempts):
            async with asyncio.timeout(self._timeout_s):
                await self._check_version()
                reply = await self._engine.generate(messages)
                # New weights may have come while it was replying.
                await self._check_version()
            try:
                return read_reply(self._rubric, reply)
            except UnreadableReplyError as error:
                why = error
                messages = ask_again(messages[:2], reply, str(error))
        raise why

    async def _check_version(self) -> None:
        version = await self._engine.version()
        if version != self._version:
            raise _WrongVersionError(f"the engine serves {version!r}, and {self._version!r} is pinned")


class _WrongVersionError(Exception):
    pass
