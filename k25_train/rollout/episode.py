"""One attempt at a task: the policy and its environment in turns, until one of them ends it.

    reset ─► opening ─► Session.turn ─► Action ─► step ─► following ─► Session.turn ─► … ─► ended

A rollout that was interrupted goes on: its environment is kept open meanwhile, or, after a crash, one whose
answers depend on nothing but actions is stepped through those that the journal has.
"""

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import numpy as np

from k25_train.environments.base import Task
from k25_train.environments.environment import Action, Environment, EnvironmentFaultError, Observation
from k25_train.rollout.engines.base import FinishReason
from k25_train.rollout.manager.scope import Scope
from k25_train.rollout.prompts import Message, Prompting
from k25_train.rollout.records import Record
from k25_train.rollout.response_records import ended, observed
from k25_train.rollout.session import Session
from k25_train.rollout.trajectory import Branch, Ended
from k25_train.rollout.turns import ROOT, Observed, Place, Turn


@dataclass(slots=True, kw_only=True)
class Episode:
    """An attempt, with what it keeps between its turns."""

    task: Task
    """What is asked."""
    environment: Environment
    """What the policy acts in."""
    messages: list[Message] = field(default_factory=list)
    """The conversation so far, for judges."""
    observation: Observation | None = None
    """What the policy has not answered yet; None before `reset`."""


class Player:
    """Plays attempts with one tokenizer, any number at once."""

    def __init__(self, prompts: Prompting, max_turns: int, max_observation_tokens: int) -> None:
        """
        Args:
            prompts: between messages and ids.
            max_turns: of an attempt.
            max_observation_tokens: longest result of a tool.
        """
        self._prompts = prompts
        self._max_turns = max_turns
        self._max_observation_tokens = max_observation_tokens

    async def play(
        self, episode: Episode, session: Session, scope: Scope, append: Callable[[Record], None]
    ) -> None:
        """Go on with an attempt until it ends, or has what its round allows.

        Raises `EnvironmentFaultError` and `SandboxError` where it has to start over, and as `Session.turn`.
        """
        task, response, name = episode.task, session.response, session.identity
        # 1. What the policy sees first, and again what it has seen already.
        if episode.observation is None:
            with scope.phase("reset", task.environment):
                episode.observation = await episode.environment.reset()
            episode.messages += episode.observation.messages
            await self._again(episode, session, scope)

        # 2. Turns.
        place = _end_of(session)
        most = min(self._max_turns, task.max_turns or self._max_turns)
        while True:
            with scope.phase("generate", "for an engine"):
                if response.open_branch >= 0:
                    turn = await session.go_on()
                else:
                    turn = await session.turn(self._seen(episode, place), place)
            place = turn.place
            if turn.finish_reason is FinishReason.aborted:
                return
            if turn.finish_reason is FinishReason.length:
                why = Ended.LENGTH
                break
            began = time.perf_counter()
            episode.observation = await self._step(episode, turn, scope)
            if episode.observation.messages:
                seconds = time.perf_counter() - began
                append(observed(name.group, name.sample, response, episode.observation.messages, seconds))
            if episode.observation.done or response.num_turns >= most:
                why = Ended.STOP if episode.observation.done else Ended.TURNS
                break
        append(ended(name.group, name.sample, response, why))

    async def _step(self, episode: Episode, turn: Turn, scope: Scope) -> Observation:
        action = self._prompts.action(turn.token_ids, thinking=episode.task.thinking)
        episode.messages.append(as_message(action))
        called = ", ".join(call.name for call in action.calls)
        with scope.phase("tool" if called else "step", called):
            observation = await episode.environment.step(action)
        episode.messages += observation.messages
        return observation

    def _seen(self, episode: Episode, place: Place) -> Observed:
        """What the policy sees before its next turn."""
        task, observation = episode.task, episode.observation
        assert observation is not None, "an environment was reset"
        if place == ROOT:
            tools = episode.environment.tools
            return self._prompts.opening(
                task.key, observation.messages, observation.media, tools, thinking=task.thinking
            )
        messages = [
            self._prompts.shortened(each, self._max_observation_tokens) for each in observation.messages
        ]
        return self._prompts.following(task.key, messages, observation.media, thinking=task.thinking)

    async def _again(self, episode: Episode, session: Session, scope: Scope) -> None:
        """Step an environment that was made again through what the journal has of the response.

        Raises `EnvironmentFaultError` where it does not answer as it did.
        """
        branches = session.response.branches
        if not branches:
            return
        if not episode.environment.is_replayable or len(branches) > 1:
            raise EnvironmentFaultError(f"{episode.task.environment}: it cannot go on where it was")
        (branch,) = branches
        turns = turns_of(branch)
        for number, (start, stop) in enumerate(turns):
            before = turns[number - 1][1] if number else 0
            self._check_seen(episode, session, branch, before, start)
            if number == len(turns) - 1 and session.response.open_branch >= 0:
                return
            tokens = branch.token_ids[start:stop]
            turn = Turn(
                place=Place(0, stop),
                token_ids=tokens,
                logprobs=branch.logprobs[start:stop],
                finish_reason=FinishReason.stop,
            )
            episode.observation = await self._step(episode, turn, scope)

    def _check_seen(
        self, episode: Episode, session: Session, branch: Branch, before: int, start: int
    ) -> None:
        place = Place(0, before) if before else ROOT
        seen = self._seen(episode, place).token_ids
        if session.collapsed(branch.token_ids[before:start]) != seen:
            raise EnvironmentFaultError(f"{episode.task.environment}: it does not answer as it did before")


def turns_of(branch: Branch) -> list[tuple[int, int]]:
    """Start and stop of each run of drawn tokens."""
    edges = np.flatnonzero(np.diff(np.concatenate([[0], branch.drawn.astype(np.int8), [0]])))
    return [(int(start), int(stop)) for start, stop in zip(edges[::2], edges[1::2], strict=True)]


def as_message(action: Action) -> Message:
    """A turn of the policy as a conversation has it."""
    message: dict[str, object] = {"role": "assistant", "content": action.content}
    if action.reasoning:
        message["reasoning_content"] = action.reasoning
    if action.calls:
        message["tool_calls"] = [
            {"id": call.id, "type": "function",
             "function": {"name": call.name, "arguments": dict(call.arguments)}}
            for call in action.calls
        ]  # fmt: skip
    return message


def _end_of(session: Session) -> Place:
    branches: Sequence[Branch] = session.response.branches
    return Place(len(branches) - 1, len(branches[-1].token_ids)) if branches else ROOT
