"""What a policy acts in, turn by turn: Gym's reset and step, in messages.

    reset ─► Observation ─► policy ─► Action ─► step ─► Observation ─► … done ─► judge ─► Verdict ─► close
              messages, images         reasoning, content, calls of tools

An environment is made for one attempt at one task, on one event loop, and closed whatever happens. It knows
messages and tools, neither tokens nor engines. Source: K2.5, section 4.4 (a Gym-like interface with pluggable
toolset, judge, prompt diversification and instruction following); the interface is our choice.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, Protocol, runtime_checkable

from k25_train.environments.base import Response, Task, Verdict
from k25_train.environments.sandboxes.base import Sandboxes
from k25_train.errors import K25Error

Tool = Mapping[str, Any]
"""Declaration of a tool as OpenAI's API has it: `{"type": "function", "function": {"name": …}}`."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ToolCall:
    """A call of a tool by the policy."""

    id: str
    """As the policy wrote it: `functions.NAME:NUMBER`."""
    name: str
    """Of the tool."""
    arguments: Mapping[str, Any]
    """As JSON has them."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Action:
    """One turn of the policy, taken apart."""

    content: str
    """What it says."""
    reasoning: str = ""
    """What it thought before."""
    calls: tuple[ToolCall, ...] = ()
    """Tools that it calls, in order."""
    fault: str = ""
    """Why its calls cannot be read; empty where they can, or where there are none."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Observation:
    """What the policy gets to see."""

    messages: tuple[Mapping[str, Any], ...] = ()
    """Behind those before (`data/chat/messages.py`): results of the calls by their ids, or a user's turn."""
    media: tuple[bytes, ...] = ()
    """Image files, one for each image part of the messages, in reading order."""
    done: bool = False
    """Whether the policy gets no further turn."""


class EnvironmentFaultError(K25Error):
    """An environment failed by no fault of the policy: the attempt counts for nothing, and another begins."""


class Environment(Protocol):
    """One attempt at one task. `SandboxError` and `EnvironmentFaultError` have it start over; whatever else a
    method raises is a fault of its code, and ends the run with the task's name."""

    @property
    def tools(self) -> tuple[Tool, ...]:
        """What the policy may call; the same from `reset` to the end."""

    @property
    def is_replayable(self) -> bool:
        """Whether the same actions give the same observations, so that a rollout that was interrupted goes on
        behind its last turn; others start over."""

    async def reset(self) -> Observation:
        """Begin: the prompt."""

    async def step(self, action: Action) -> Observation:
        """What comes of a turn. A tool that fails, or takes too long, says so in its message."""

    async def judge(self, response: Response) -> Verdict:
        """The verdict, once the policy has left: nothing that it has started still runs."""

    async def close(self) -> None:
        """Give back what it holds. Twice is as once."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Endpoint:
    """Where an agent asks the policy, of one attempt."""

    base_url: str
    """OpenAI's API, with `/v1`: a session of the gateway. Whoever has it may ask."""
    key: str
    """Key of the session, for agents that can be given no path."""
    model: str
    """Name that the policy answers to."""


@runtime_checkable
class Driven(Protocol):
    """What an environment has whose own agents act: `reset`, `drive` instead of turns and `step`, `judge`.
    Its tasks name these in `Task.agent`."""

    async def drive(self, endpoint: Endpoint) -> None:
        """Have the agents act until they are done. Cancelled, it has them stop."""


class Judging(Protocol):
    """Judges any task by the judge that it names."""

    async def judge(self, task: Task, response: Response) -> Verdict:
        """The verdict."""


class Chat(Protocol):
    """A model that answers, such as a judge's or a frozen sub-agent's; never trained."""

    async def __call__(self, messages: tuple[Mapping[str, Any], ...], tools: tuple[Tool, ...] = ()) -> Action:
        """Its next turn."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Services:
    """What environments may use."""

    sandboxes: Sandboxes
    """Opens sandboxes."""
    judging: Judging
    """Judges by name."""
    tool_timeout_s: float
    """Seconds that one call of a tool may take."""
    chats: Mapping[str, Chat] = field(default_factory=dict)
    """Name -> model."""


MakeEnvironment = Callable[[Task, Services], Environment]
"""What an entry point of the group `k25_train.environments` names."""
