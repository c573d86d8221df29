"""Rollouts on this event loop: attempts until one has ended, then a verdict. Nothing is made up.

What fails by the environment's fault starts over, what fails by a judge's is judged again; neither is ever a
reward of 0. After so many times the run ends with the task's name.
"""

import asyncio
from collections.abc import Callable
from dataclasses import dataclass

from k25_train.config.rollout import RolloutConfig
from k25_train.environments import base
from k25_train.environments.base import Status, Verdict, unscored
from k25_train.environments.environment import EnvironmentFaultError, Services
from k25_train.environments.registry import make_environment
from k25_train.environments.sandboxes.base import SandboxError
from k25_train.errors import RolloutError
from k25_train.rollout.asking import Asking
from k25_train.rollout.episode import Episode, Player, turns_of
from k25_train.rollout.manager.manager import RolloutManager
from k25_train.rollout.manager.scope import Scope
from k25_train.rollout.prompts import Prompting
from k25_train.rollout.records import Record
from k25_train.rollout.response_records import ended, judged, restarted
from k25_train.rollout.session import Identity, Session
from k25_train.rollout.trajectory import Ended, Response, no_tokens
from k25_train.rollout.tries import AttemptError, Count, tried
from k25_train.rollout.work import Work

Append = Callable[[Record], None]


@dataclass(frozen=True, slots=True, kw_only=True)
class Parts:
    """What rollouts are made with."""

    asking: Asking
    """Asks engines."""
    prompts: Prompting
    """Between messages and ids."""
    services: Services
    """What environments may use."""
    manager: RolloutManager
    """Admits and watches."""
    count: Count
    """Told what has happened, by kind."""


class LocalRollouts:
    """See `Rollouts`."""

    def __init__(self, config: RolloutConfig, parts: Parts) -> None:
        self._config = config
        self._parts = parts
        manager = config.manager
        self._player = Player(parts.prompts, manager.max_turns, manager.max_observation_tokens)
        self._kept: dict[tuple[int, int], Episode] = {}
        """Group and sample -> attempt that a round has interrupted."""
        self._being_judged = 0

    @property
    def manager(self) -> RolloutManager:
        """Admits and watches the rollouts."""
        return self._parts.manager

    async def respond(self, work: Work, append: Append) -> None:
        """See `Rollouts`."""
        await self._parts.manager.run(
            f"{work.task.key}#{work.sample}",
            lambda scope: self._respond(work, append, scope),
            source=work.source,
            order=work.group,
            needs_sandbox=work.task.needs_sandbox,
        )

    async def close(self) -> None:
        """See `Rollouts`."""
        kept, self._kept = list(self._kept.values()), {}
        async with asyncio.timeout(self._config.manager.teardown_timeout_s):
            await asyncio.gather(*(each.environment.close() for each in kept), return_exceptions=True)
        await self._parts.manager.close()

    async def _respond(self, work: Work, append: Append, scope: Scope) -> None:
        causes: list[str] = []
        while True:
            try:
                return await self._attempt(work, append, scope)
            except (SandboxError, EnvironmentFaultError) as error:
                causes.append(f"{type(error).__name__}: {error}")
            self._parts.count("restarted")
            if len(causes) > self._config.manager.max_restarts:
                raise RolloutError(
                    f"task {work.task.key}: given up after {len(causes)} attempts "
                    f"(rollout.manager.max_restarts): {'; '.join(causes)}. Nothing is lost: put right what "
                    "failed, and start again"
                )
            append(restarted(work.group, work.sample, work.response.attempt + 1, causes[-1]))

    async def _attempt(self, work: Work, append: Append, scope: Scope) -> None:
        key, response = (work.group, work.sample), work.response
        episode = self._kept.pop(key, None) or Episode(
            task=work.task, environment=make_environment(work.task, self._parts.services)
        )
        keeps = False
        try:
            if not response.is_finished:
                await self._play(episode, work, append, scope)
            if not response.is_finished:
                keeps, self._kept[key] = True, episode
                return
            if not response.is_judged:
                verdict = await self._judge(episode, work, scope)
                append(judged(work.group, work.sample, verdict))
        finally:
            if not keeps:
                await scope.teardown(episode.environment.close(), f"environment {work.task.environment}")

    async def _play(self, episode: Episode, work: Work, append: Append, scope: Scope) -> None:
        session = Session(
            Identity(task=work.task.key, group=work.group, sample=work.sample, seed=work.seed),
            work.response,
            work.media,
            asking=self._parts.asking,
            vocabulary=self._parts.prompts,
            allowed=work.allowed,
            append=append,
        )
        try:
            async with asyncio.timeout(self._config.manager.rollout_timeout_s):
                await self._player.play(episode, session, scope, append)
        except TimeoutError:
            self._parts.count("timeout")
            append(ended(work.group, work.sample, work.response, Ended.TIMEOUT))

    async def _judge(self, episode: Episode, work: Work, scope: Scope) -> Verdict:
        """The verdict on a response that has ended, scored or failed. Raises `RolloutError` for none."""
        response = self._whole(episode, work.response)
        with scope.phase("judge", work.task.judge):
            return await tried(
                f"task {work.task.key}, judge {work.task.judge}",
                lambda: self._judged(episode, response),
                max_attempts=self._config.max_attempts,
                count=self._parts.count,
                is_hopeless=lambda: False,
            )

    def _whole(self, episode: Episode, response: Response) -> base.Response:
        """A response as judges see it."""
        branch = response.branches[-1] if response.branches else None
        turns = turns_of(branch) if branch else []
        last = branch.token_ids[slice(*turns[-1])] if branch and turns else no_tokens()
        return base.Response(
            text=self._parts.prompts.decode(last),
            num_tokens=len(response.token_ids),
            ended=response.ended is Ended.STOP,
            messages=tuple(episode.messages) if len(turns) > 1 or response.num_turns > 1 else (),
        )

    async def _judged(self, episode: Episode, response: base.Response) -> Verdict:
        """One try. Raises `AttemptError` for no verdict, or one that says that there is none."""
        self._being_judged += 1
        # Judges have a limit of their own for each; this one, for those that do not keep to it, holds even if
        # they judge one after another.
        limit_s = self._config.judge_timeout_s * (self._being_judged + 1)
        try:
            async with asyncio.timeout(limit_s):
                verdict = await episode.environment.judge(response)
        except TimeoutError:
            verdict = unscored(f"judge timed out: no verdict within {limit_s:g} s (rollout.judge_timeout_s)")
        except (SandboxError, EnvironmentFaultError):
            raise
        except Exception as error:
            # Whatever a judge raises is no verdict on the response.
            verdict = unscored(f"judge raised: {type(error).__name__}: {error}")
        finally:
            self._being_judged -= 1
        if verdict.status is Status.UNSCORED:
            raise AttemptError(verdict.kind.replace(" ", "_"), verdict.reason)
        return verdict
