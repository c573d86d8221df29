"""What a task says of the tools that its policy has, and of the sandbox in which they act.

{"toolsets": {"python": {}, "search": {"index": "docs.sqlite"}},   name -> options, in this order
 "files": {"data.csv": "a,b\\n1,2\\n",                               path in /work -> text,
           "logo.png": {"media": 0}, "x.bin": {"base64": "…"}},     an image of the task, or bytes
 "prepare": ["tar xf repo.tar && rm repo.tar"],                     commands before the policy comes
 "tools": {"python": {"name": "run_code", "arguments": {"code": "source"}}},   names that it sees instead
 "keeps_history": false,                       whether its git repositories have more than one commit
 "network": false, "result_bytes": 20000, "left_bytes": 16777216}
"""

import base64
import binascii
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from k25_train.environments.base import Task
from k25_train.environments.toolsets.base import Toolset
from k25_train.environments.toolsets.registry import make_toolset
from k25_train.errors import ConfigError

RESULT_BYTES = 20_000
"""Longest text of a result, unless the task says otherwise; the episode cuts by tokens. Our choice."""
LEFT_BYTES = 16 << 20
"""Most bytes that a policy may leave for its judges, unless the task says otherwise. Our choice."""
_KEYS = (
    "toolsets", "files", "prepare", "tools", "keeps_history", "network", "result_bytes", "left_bytes",
)  # fmt: skip


@dataclass(frozen=True, slots=True, kw_only=True)
class ToolSetup:
    """`Task.setup`, read."""

    toolsets: Mapping[str, Toolset]
    """By name, in order."""
    files: Mapping[str, bytes]
    """In /work when the policy comes."""
    prepare: tuple[str, ...]
    """Command lines that are run before."""
    forgets_history: bool
    """Whether git repositories are left with one commit before the policy comes."""
    tools: Mapping[str, Mapping[str, Any]]
    """Tool -> what the policy sees instead: `name`, `description`, `arguments`."""
    network: bool
    """Whether its sandbox may reach the network."""
    result_bytes: int
    """Longest text of a result."""
    left_bytes: int
    """Most bytes of files that are handed to judges."""

    @property
    def needs_sandbox(self) -> bool:
        """Whether any of it acts in a sandbox."""
        return bool(self.files or self.prepare) or any(each.needs_sandbox for each in self.toolsets.values())


def read_setup(task: Task) -> ToolSetup:
    """What the task says. Raises ConfigError for what is wrong with it, with the task's key."""
    given = task.setup
    try:
        _check_keys(given)
        setup = ToolSetup(
            toolsets={name: make_toolset(name, options) for name, options in given["toolsets"].items()},
            files={path: _content(task, path, value) for path, value in given.get("files", {}).items()},
            prepare=tuple(map(str, given.get("prepare", ()))),
            forgets_history=not given.get("keeps_history", False) and _may_have_git(given),
            tools=given.get("tools", {}),
            network=bool(given.get("network", False)),
            result_bytes=int(given.get("result_bytes", RESULT_BYTES)),
            left_bytes=int(given.get("left_bytes", LEFT_BYTES)),
        )
    except ConfigError as error:
        raise ConfigError(f"task {task.key}: its setup: {error}") from error
    except (KeyError, ValueError, TypeError, AttributeError, IndexError) as error:
        raise ConfigError(
            f"task {task.key}: its setup cannot be read ({type(error).__name__}: {error})\n"
            "  -> k25_train/environments/tool_setup.py says what it may have"
        ) from error
    if setup.needs_sandbox and not task.needs_sandbox:
        raise ConfigError(
            f"task {task.key}: its tools act in a sandbox, and it does not say so\n  -> needs_sandbox=True"
        )
    return setup


def _may_have_git(given: Mapping[str, Any]) -> bool:
    return bool(given.get("prepare")) or any(".git" in path for path in given.get("files", {}))


def _check_keys(given: Mapping[str, Any]) -> None:
    if unknown := sorted(given.keys() - set(_KEYS)):
        raise ValueError(f"it has no {', '.join(unknown)}; there is {', '.join(_KEYS)}")


def _content(task: Task, path: str, value: Any) -> bytes:
    """The content of a file of the setup. Raises ValueError and IndexError."""
    if path.startswith("/") or ".." in path.split("/"):
        raise ValueError(f"the file {path!r} does not lie in /work")
    if isinstance(value, str):
        return value.encode()
    if "media" in value:
        return task.media[int(value["media"])]
    try:
        return base64.b64decode(value["base64"], validate=True)
    except binascii.Error as error:
        raise ValueError(f"the file {path!r}: {error}") from error
