"""One attempt at a task: the policy and its environment in turns, until one of them ends it.

    reset ─► opening ─► Session.turn ─► Action ─► step ─► following ─► Session.turn ─► … ─► ended

A rollout that was interrupted goes on: its environment is kept open meanwhile, or, after a crash, one whose
answers depend on nothing but actions is stepped through those that the journal has, and has to answer as it
did.
"""

import asyncio
import time
from collections.abc import Mapping
from dataclasses import dataclass, field

from k25_train.environments.base import Task
from k25_train.environments.environment import Environment, Observation
from k25_train.environments.reply import as_message
from k25_train.rollout.agents import Agents
from k25_train.rollout.branches import Branch
from k25_train.rollout.engines.base import FinishReason
from k25_train.rollout.environment_calls import LostError, asked
from k25_train.rollout.manager.scope import Scope
from k25_train.rollout.prompts import Message, Prompting
from k25_train.rollout.response_records import digest_of, ended, observed
from k25_train.rollout.session import Session
from k25_train.rollout.trajectory import Ended
from k25_train.rollout.turns import ROOT, Observed, Place
from k25_train.rollout.work import Append


@dataclass(frozen=True, slots=True, kw_only=True)
class Limits:
    """Of an attempt."""

    turns: int
    """Turns; a task may allow fewer."""
    observation_tokens: int
    """Longest result of a tool."""
    seconds: float
    """From the first turn on, while it is not between two rounds."""


@dataclass(slots=True, kw_only=True)
class Episode:
    """An attempt, with what it keeps between its turns."""

    task: Task
    """What is asked."""
    environment: Environment
    """What the policy acts in."""
    messages: list[Message] = field(default_factory=list)
    """The conversation so far, for judges."""
    files: Mapping[str, bytes] = field(default_factory=dict)
    """What an agent has left in its own sandbox."""
    spoiled: str = ""
    """Why that cannot be judged, so that the response has failed; empty where it can."""
    observation: Observation | None = None
    """What the policy has not answered yet; None before `reset`."""
    last_id: int = -1
    """Last token of the turn before it."""
    used_s: float = 0.0
    """Seconds that it took in the rounds before."""


class Player:
    """Plays attempts with one tokenizer, any number at once."""

    def __init__(self, prompts: Prompting, limits: Limits, agents: Agents) -> None:
        """
        Args:
            prompts: between messages and ids.
            limits: of an attempt.
            agents: act where a task names one.
        """
        self._prompts = prompts
        self._limits = limits
        self._agents = agents

    async def play(self, episode: Episode, session: Session, scope: Scope, append: Append) -> None:
        """Go on with an attempt until it ends, or has what its round allows.

        Raises `EnvironmentFaultError`, `SandboxError` and `LostError` where it has to start over, and as
        `Session.turn`.
        """
        why = await self.begin(episode, session, scope, append)
        clock = asyncio.get_running_loop().time
        # An engine may be waited for: time counts from the first turn on, and from the start for agents.
        since = clock() if session.response.num_turns or episode.task.agent else None
        left_s = max(self._limits.seconds - episode.used_s, 0.0)
        try:
            async with asyncio.timeout(left_s if since is not None else None) as limit:
                if why is None and episode.task.agent:
                    why = await self._have_agent_act(episode, session, scope)
                while why is None:
                    reason = await self._turn(episode, session, scope)
                    if since is None:
                        since = clock()
                        limit.reschedule(since + left_s)
                    if reason is FinishReason.aborted:
                        return
                    why = Ended.LENGTH
                    if reason is FinishReason.stop:
                        why = await self._act(episode, session, scope, append)
        except TimeoutError:
            if not limit.expired():
                raise
            why = Ended.TIMEOUT
        finally:
            episode.used_s += clock() - since if since is not None else 0.0
        if session.response.ended is None:
            append(ended(session.identity.group, session.identity.sample, session.response, why))

    async def begin(self, episode: Episode, session: Session, scope: Scope, append: Append) -> Ended | None:
        """Reset an environment and bring it to where the journal ends, unless it is there; why the response
        ended, if it did. Raises as `play`."""
        response, branches = session.response, session.response.branches
        if episode.observation is not None:
            return response.ended
        can_replay = episode.environment.is_replayable and not episode.task.agent
        if branches and not (can_replay and len(branches) == 1):
            raise LostError(f"{episode.task.environment}: it cannot go on where it was")
        with scope.phase("reset", episode.task.environment):
            episode.observation = await asked("reset", episode.environment.reset(), self._limits.seconds)
        episode.messages += episode.observation.messages
        why = await self._again(episode, session, branches[0], scope, append) if branches else None
        return response.ended or why

    async def _again(
        self, episode: Episode, session: Session, branch: Branch, scope: Scope, append: Append
    ) -> Ended | None:
        """Step an environment that was made again through what the journal has of the response. Raises
        `LostError` where it does not answer as it did."""
        why, before, media = None, 0, list(branch.media)
        turns = branch.turns()
        for number, (start, stop) in enumerate(turns):
            # 1. What the policy saw before the turn, images included.
            seen = self._seen(episode, Place(0, before) if before else ROOT)
            expected = session.collapsed(branch.token_ids[before:start])
            shown, media = media[: len(seen.media)], media[len(seen.media) :]
            if expected != seen.token_ids or shown != [digest_of(image) for image in seen.media]:
                raise LostError(f"{episode.task.environment}: it does not answer as it did before")

            # 2. What came of it. A turn that goes on, or ended for want of room, is no action.
            is_last = number == len(turns) - 1
            if is_last and session.response.open_branch >= 0:
                return None
            if is_last and int(branch.token_ids[stop - 1]) not in self._prompts.stop_ids:
                return Ended.LENGTH
            if session.response.ended is Ended.TIMEOUT and number >= session.response.num_answers:
                # The environment was late with it, and would be again.
                action = self._prompts.action(branch.token_ids[start:stop], thinking=episode.task.thinking)
                episode.messages.append(as_message(action))
                return Ended.TIMEOUT
            why = await self._act(episode, session, scope, append, turn=(number, start, stop))
            before = stop
        return why

    async def _have_agent_act(self, episode: Episode, session: Session, scope: Scope) -> Ended:
        task, opening = episode.task, episode.observation
        assert opening is not None, "an environment was reset"
        with scope.phase("agent", task.agent[0]):
            acted = await self._agents.act(task, episode.environment, opening, session, scope)
        episode.messages = list(acted.messages)
        episode.files, episode.spoiled = acted.files, acted.cause
        return acted.ended

    async def _turn(self, episode: Episode, session: Session, scope: Scope) -> FinishReason:
        """Have the policy take its turn, or go on with it; why it ended."""
        response = session.response
        with scope.phase("generate", "for an engine"):
            if response.open_branch >= 0:
                turn = await session.go_on()
            else:
                branches = response.branches
                place = Place(len(branches) - 1, len(branches[-1].token_ids)) if branches else ROOT
                turn = await session.turn(self._seen(episode, place), place)
        return turn.finish_reason

    async def _act(
        self,
        episode: Episode,
        session: Session,
        scope: Scope,
        append: Append,
        turn: tuple[int, int, int] | None = None,
    ) -> Ended | None:
        """Do what a turn says; why the response ended, if it did.

        `turn`: its number, start and stop; None for the latest one.
        """
        response, name = session.response, session.identity
        branch = response.branches[-1]
        number, start, stop = turn or (response.num_turns - 1, *branch.turns()[-1])
        # 1. What it says, and what the environment says to it.
        action = self._prompts.action(branch.token_ids[start:stop], thinking=episode.task.thinking)
        episode.messages.append(as_message(action))
        called = ", ".join(call.name for call in action.calls)
        began = time.perf_counter()
        with scope.phase("tool" if called else "step", called):
            step = episode.environment.step(action)
            observation = await asked(f"step ({called or 'no call'})", step, self._limits.seconds)
        seconds = time.perf_counter() - began
        messages = [
            self._prompts.shortened(each, self._limits.observation_tokens) for each in observation.messages
        ]
        episode.observation = Observation(
            messages=tuple(messages), media=observation.media, done=observation.done
        )
        episode.messages += messages
        episode.last_id = int(branch.token_ids[stop - 1])

        # 2. On record, unless it is there.
        is_news = messages or action.calls or action.fault
        if is_news and number >= response.num_answers:
            told = observed(name.group, name.sample, response, number, episode.observation, action, seconds)
            append(told)

        # 3. What follows.
        if observation.done:
            return Ended.STOP
        most = min(self._limits.turns, episode.task.max_turns or self._limits.turns)
        return Ended.TURNS if number + 1 >= most else None

    def _seen(self, episode: Episode, place: Place) -> Observed:
        """What the policy sees before its next turn."""
        task, observation = episode.task, episode.observation
        assert observation is not None, "an environment was reset"
        if place == ROOT:
            tools = episode.environment.tools
            return self._prompts.opening(
                task.key, observation.messages, observation.media, tools, thinking=task.thinking
            )
        return self._prompts.following(
            task.key,
            observation.messages,
            observation.media,
            thinking=task.thinking,
            last_id=episode.last_id,
        )
