"""A set of tools, and what it is opened with.

    options ─► Toolset ─► open(place) ─► Tools: declarations, call ─► ToolResult ─► close

A toolset is made from the options of a task, opened once for an attempt, and closed whatever happens. What
the policy did wrong is a result with `is_error`; what the machine did wrong is raised, and the attempt starts
over.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Protocol

from k25_train.environments.environment import Services, Tool
from k25_train.environments.sandboxes.base import SandboxSession


@dataclass(frozen=True, slots=True, kw_only=True)
class ToolResult:
    """What a call gave."""

    text: str
    """For the policy."""
    media: tuple[bytes, ...] = ()
    """Image files, shown behind the text; whatever is none that can be read is told instead."""
    is_error: bool = False
    """Whether the call failed, by the policy's fault or the tool's."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Place:
    """Where tools are opened."""

    task: str
    """Key of the task, for messages."""
    sandbox: SandboxSession | None
    """The attempt's own; None where no toolset needs one."""
    services: Services
    """What environments may use; `services.tool_timeout_s` is the limit of one call."""
    has_acted: Callable[[], bool] = lambda: False
    """Whether the policy has made a call before: what does not start from then on may be its doing."""

    @property
    def session(self) -> SandboxSession:
        """The sandbox of a toolset that has said it needs one."""
        assert self.sandbox is not None, "a toolset opens a sandbox that it has not asked for"
        return self.sandbox


class Tools(Protocol):
    """A toolset that is open."""

    @property
    def declarations(self) -> tuple[Tool, ...]:
        """What may be called, in OpenAI's form."""

    async def call(self, name: str, arguments: Mapping[str, Any]) -> ToolResult:
        """Call a tool with arguments that its schema allows.

        Raises `SandboxError` and `EnvironmentFaultError` by the machine's fault. Calls come one after
        another; one that takes longer than `tool_timeout_s` is cancelled, and the next may still come.
        """

    async def close(self) -> None:
        """Give back what it holds. Twice is as once."""


class Toolset(Protocol):
    """Tools that can be opened."""

    @property
    def declarations(self) -> tuple[Tool, ...]:
        """What may be called, as far as it is known before it is opened: a server may have to be asked."""

    @property
    def needs_sandbox(self) -> bool:
        """Whether its tools act in a sandbox."""

    @property
    def files(self) -> Mapping[str, bytes]:
        """What its sandbox has to have: absolute path -> content, read-only."""

    @property
    def is_replayable(self) -> bool:
        """Whether the same calls give the same results, in whichever process."""

    async def open(self, place: Place) -> Tools:
        """Open it. Raises `SandboxError` and `EnvironmentFaultError`."""


MakeToolset = Callable[[Mapping[str, Any]], Toolset]
"""From options, as JSON has them. Raises ConfigError for those that are not right."""


def declared(name: str, description: str, properties: Mapping[str, Any], required: tuple[str, ...]) -> Tool:
    """The declaration of a tool whose arguments are an object without further keys."""
    parameters = {
        "type": "object",
        "properties": dict(properties),
        "required": list(required),
        "additionalProperties": False,
    }
    function = {"name": name, "description": description, "parameters": parameters}
    return {"type": "function", "function": function}


def wrong(text: str) -> ToolResult:
    """The result of a call that failed."""
    return ToolResult(text=text, is_error=True)
