"""The toolset `shell`: commands in the sandbox. No options."""

from collections.abc import Mapping
from typing import Any

from k25_train.environments.environment import Tool
from k25_train.environments.sandboxes.base import WORK, Ending, Finished
from k25_train.environments.toolsets.base import Place, ToolResult, declared
from k25_train.environments.toolsets.options import ToolOptions

SHELL = declared(
    "shell",
    f"Run a command line with sh in {WORK}. Each call is a shell of its own: files stay, variables and the "
    "current folder do not.",
    {"command": {"type": "string", "description": "The command line."}},
    ("command",),
)


class Shell:
    """See `Toolset`."""

    declarations: tuple[Tool, ...] = (SHELL,)
    needs_sandbox = True
    is_replayable = False
    files: Mapping[str, bytes] = {}

    async def open(self, place: Place) -> "_OpenShell":
        """See `Toolset`."""
        return _OpenShell(place)


class _OpenShell:
    declarations = Shell.declarations

    def __init__(self, place: Place) -> None:
        self._place = place

    async def call(self, name: str, arguments: Mapping[str, Any]) -> ToolResult:
        """Run the command."""
        limit_s = self._place.services.tool_timeout_s
        command = ["/bin/sh", "-c", arguments["command"]]
        return told(await self._place.session.run(command, timeout_s=limit_s), limit_s)

    async def close(self) -> None:
        """It holds nothing."""


def told(finished: Finished, limit_s: float) -> ToolResult:
    """What a command has printed, and how it ended where that was not well."""
    texts = (finished.stdout.decode(errors="replace"), finished.stderr.decode(errors="replace"))
    said = "\n".join(text.rstrip("\n") for text in texts if text)
    ends = {
        Ending.EXITED: f"[exit status {finished.status}]" if finished.status else "",
        Ending.OUT_OF_TIME: f"[killed after {limit_s:g} s]",
        Ending.OUT_OF_MEMORY: "[killed: out of memory]",
        Ending.TOO_MUCH_OUTPUT: "[killed: too much output]",
    }.get(finished.ending, f"[{finished.ending}]")
    text = "\n".join(part for part in (said, ends) if part)
    return ToolResult(text=text or "[no output]", is_error=bool(ends))


def make_shell(options: Mapping[str, Any]) -> Shell:
    """It has no options."""
    ToolOptions("shell", options).end()
    return Shell()
