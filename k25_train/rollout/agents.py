"""Agents that act instead of our loop: commands that speak to the policy through a gateway."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Protocol

from k25_train.environments.base import Task
from k25_train.environments.environment import Environment, Observation
from k25_train.errors import RolloutError
from k25_train.rollout.manager.scope import Scope
from k25_train.rollout.prompts import Message
from k25_train.rollout.session import Session
from k25_train.rollout.trajectory import Ended


@dataclass(frozen=True, slots=True, kw_only=True)
class Acted:
    """What came of it."""

    ended: Ended
    """Why there are no more turns."""
    messages: tuple[Message, ...]
    """The conversation that the agent has led, for judges."""
    files: Mapping[str, bytes] = field(default_factory=dict)
    """What it has left in its sandbox: path below /work -> content."""
    cause: str = ""
    """Why these files cannot be judged; empty where they can."""


class Agents(Protocol):
    """Has agents act, any number at once."""

    async def act(
        self, task: Task, environment: Environment, opening: Observation, session: Session, scope: Scope
    ) -> Acted:
        """Run `task.agent` until it ends; whoever cancels it ends the command.

        Args:
            task: with the command.
            environment: that was reset, and judges afterwards.
            opening: what it said: the prompt.
            session: of the response, for the gateway.
            scope: of the rollout.

        Raises `EnvironmentFaultError` where the command or its sandbox fails by no fault of the policy.
        """

    async def close(self) -> None:
        """End what they speak to. Twice is as once."""


class NoAgents:
    """There is no gateway."""

    async def act(
        self, task: Task, environment: Environment, opening: Observation, session: Session, scope: Scope
    ) -> Acted:
        """See `Agents`. Raises `RolloutError`."""
        raise RolloutError(
            f"task {task.key}: environment.tasks names an agent, {task.agent[0]}, but there is no gateway"
        )

    async def close(self) -> None:
        """There is nothing to end."""
