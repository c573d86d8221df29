"""Rollouts on this event loop: attempts until one has ended, then a verdict. Nothing is made up.

What fails by the environment's fault starts over, what fails by a judge's is judged again; neither is ever a
reward of 0. After so many times the run ends with the task's name.
"""

import asyncio
from contextlib import suppress
from dataclasses import dataclass, field, replace

from k25_train.config.rollout import RolloutConfig
from k25_train.environments import base
from k25_train.environments.base import Status, Verdict, failed, unscored
from k25_train.environments.environment import EnvironmentFaultError, Services
from k25_train.environments.registry import make_environment
from k25_train.environments.sandboxes.base import SandboxError
from k25_train.errors import ConfigError, RolloutError
from k25_train.rollout.agents import Agents, NoAgents
from k25_train.rollout.asking import Asking
from k25_train.rollout.environment_calls import LostError
from k25_train.rollout.episode import Episode, Limits, Player
from k25_train.rollout.manager.manager import RolloutManager
from k25_train.rollout.manager.scope import Scope
from k25_train.rollout.manager.snapshot import Snapshot
from k25_train.rollout.prompts import Prompting
from k25_train.rollout.records import Record
from k25_train.rollout.response_records import judged, restarted
from k25_train.rollout.session import Identity, Session
from k25_train.rollout.trajectory import Ended, Response
from k25_train.rollout.tries import FIRST_WAIT_S, LONGEST_WAIT_S, AttemptError, Count, tried
from k25_train.rollout.work import Append, Work


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
    agents: Agents = field(default_factory=NoAgents)
    """Has agents act."""


class LocalRollouts:
    """See `Rollouts`.

    A response that its round has cut keeps its environment until it is asked for again. One whose environment
    has a sandbox is not cut: sandboxes that nobody uses would be in the way of others, for ever if these have
    to end first. Nor is one that an agent makes, which does not know of rounds.
    """

    def __init__(self, config: RolloutConfig, parts: Parts) -> None:
        self._config = config
        self._parts = parts
        manager = config.manager
        limits = Limits(
            turns=manager.max_turns,
            observation_tokens=manager.max_observation_tokens,
            seconds=manager.rollout_timeout_s,
        )
        self._player = Player(parts.prompts, limits, parts.agents)
        self._kept: dict[tuple[int, int], Episode] = {}
        """Group and sample -> attempt that a round has interrupted."""
        self._being_judged = 0

    @property
    def manager(self) -> RolloutManager:
        """Admits and watches the rollouts."""
        return self._parts.manager

    async def snapshot(self) -> Snapshot:
        """How its rollouts are."""
        return self._parts.manager.snapshot()

    async def respond(self, work: Work, append: Append) -> None:
        """See `Rollouts`."""
        await self._parts.manager.run(
            f"{work.task.key}#{work.sample}",
            lambda scope: self._respond(work, _recording(append, scope), scope),
            source=work.source,
            order=work.group,
            needs_sandbox=work.task.needs_sandbox,
        )

    async def announce(self, version: int) -> None:
        """See `Rollouts`: the engines' pool knows."""

    async def close(self) -> None:
        """See `Rollouts`."""
        kept, self._kept = list(self._kept.values()), {}
        with suppress(TimeoutError):
            async with asyncio.timeout(self._config.manager.teardown_timeout_s):
                await asyncio.gather(*(each.environment.close() for each in kept), return_exceptions=True)
        await self._parts.manager.close()
        await self._parts.agents.close()

    async def _respond(self, work: Work, append: Append, scope: Scope) -> None:
        """Attempts, until one has ended or has what the round allows."""
        response = work.response
        while True:
            try:
                return await self._attempt(work, append, scope)
            except LostError as error:
                cause, has_failed = str(error), False
            except (SandboxError, EnvironmentFaultError) as error:
                cause, has_failed = f"{type(error).__name__}: {error}", True
            if has_failed and response.num_failures >= self._config.manager.max_restarts:
                raise RolloutError(
                    f"task {work.task.key}: given up after {response.num_failures} restarts "
                    f"(rollout.manager.max_restarts): {cause}. Nothing is lost: put right what failed, and "
                    "start again"
                )
            self._parts.count("restarted/failed" if has_failed else "restarted/lost")
            append(restarted(work.group, work.sample, response.attempt + 1, cause, has_failed=has_failed))
            if has_failed:
                await asyncio.sleep(min(FIRST_WAIT_S * 2**response.num_failures, LONGEST_WAIT_S))

    async def _attempt(self, work: Work, append: Append, scope: Scope) -> None:
        key, response = (work.group, work.sample), work.response
        episode = self._kept.pop(key, None) or self._begun(work)
        keeps = False
        try:
            session = self._session(work, append)
            if response.is_finished:
                # Killed before it was judged: what is to be judged has to be there again.
                await self._player.begin(episode, session, scope, append)
            else:
                await self._player.play(episode, session, scope, append)
            if not response.is_finished:
                keeps, self._kept[key] = True, episode
                return
            if not response.is_judged:
                verdict = await self._judge(episode, work, scope)
                append(judged(work.group, work.sample, verdict))
        finally:
            if not keeps:
                await scope.teardown(episode.environment.close(), f"environment {work.task.environment}")

    def _begun(self, work: Work) -> Episode:
        """A new attempt. Raises `EnvironmentFaultError` for an environment that cannot be made."""
        try:
            environment = make_environment(work.task, self._parts.services)
        except (ConfigError, EnvironmentFaultError, SandboxError):
            raise
        except Exception as error:
            raise EnvironmentFaultError(f"it cannot be made: {type(error).__name__}: {error}") from error
        return Episode(task=work.task, environment=environment)

    def _session(self, work: Work, append: Append) -> Session:
        is_cut = not work.task.needs_sandbox and not work.task.agent
        return Session(
            Identity(task=work.task.key, group=work.group, sample=work.sample, seed=work.seed),
            work.response,
            work.media,
            asking=self._parts.asking,
            vocabulary=self._parts.prompts,
            allowed=work.allowed if is_cut else replace(work.allowed, cap=None),
            append=append,
        )

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
        return base.Response(
            text=self._parts.prompts.decode(response.last_turn),
            num_tokens=len(response.token_ids),
            ended=response.ended is Ended.STOP,
            messages=tuple(episode.messages),
            files=episode.files,
        )

    async def _judged(self, episode: Episode, response: base.Response) -> Verdict:
        """One try. Raises `AttemptError` for no verdict, or one that says that there is none."""
        if episode.spoiled:
            return failed(episode.spoiled)
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


def _recording(append: Append, scope: Scope) -> Append:
    """Where a record is refused, that is what the rollout failed in, and not what it had just done."""

    def recorded(record: Record) -> None:
        try:
            append(record)
        except RolloutError:
            with scope.phase("record", record.header["kind"]):
                raise

    return recorded
