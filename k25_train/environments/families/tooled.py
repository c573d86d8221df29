"""Tasks whose policy has tools: the environment `tools`, and calls of what its toolsets declare."""

from collections.abc import Mapping
from typing import Any

from k25_train.environments.base import Task
from k25_train.environments.environment import Action
from k25_train.environments.family import call

SHELL = "shell"
FILES = "files"
PYTHON = "python"
SEARCH = "search"
ZOOM = "zoom"
SANDBOXED = (SHELL, FILES, PYTHON)
"""Toolsets that act in a sandbox."""


def tooled(
    *,
    key: str,
    family: str,
    prompt: Any,
    toolsets: Mapping[str, Mapping[str, Any]],
    files: Mapping[str, Any],
    reference: Any,
    judge: str,
    problem: str,
    media: tuple[bytes, ...] = (),
) -> Task:
    """A task with tools.

    Args:
        key: as of `Task`; so are family, reference, judge, problem and media.
        prompt: content of the user's message.
        toolsets: name -> options.
        files: path in /work -> text, or `{"media": 0}` for an image of the task.
    """
    return Task(
        key=key,
        family=family,
        messages=({"role": "user", "content": prompt},),
        media=media,
        reference=reference,
        judge=judge,
        problem=problem,
        thinking=True,
        environment="tools",
        setup={"toolsets": dict(toolsets), "files": dict(files)},
        needs_sandbox=bool(files) or any(name in SANDBOXED for name in toolsets),
    )


def run_shell(command: str) -> Action:
    """A turn that runs a command line."""
    return call("shell", command=command)


def run_python(code: str) -> Action:
    """A turn that runs a cell."""
    return call("python", code=code)


def write_file(path: str, content: str) -> Action:
    """A turn that writes a file."""
    return call("write_file", path=path, content=content)
