"""A Harbor task folder, read and checked.

    instruction.md  task.toml  environment/ (Dockerfile, what it copies)  tests/test.sh …  solution/solve.sh

Sandboxes have one folder that may be written to. Harbor's folders are moved there, in texts of instruction,
environment, tests and solution alike: /app is /work, /logs/verifier is /work/.verifier. Source: Harbor's
documentation of tasks (version 1.0 of task.toml).
"""

import tomllib
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from k25_train.environments.sandboxes.base import WORK
from k25_train.errors import ConfigError

LOGS = ".verifier"
"""Folder below /work for what tests write, and for the reward."""
MOVED = {"/logs/verifier": f"{WORK}/{LOGS}", "/app": WORK}
"""Folder of Harbor -> where it is here."""
BUILD_FILES = ("Dockerfile", "docker-compose.yaml", "docker-compose.yml", ".dockerignore")
"""Of environment/: not copied."""
MAX_BYTES = 64 << 20
"""All files of one task. Our choice: larger ones belong in an image."""
DEFAULT_TIMEOUT_S = 600.0
"""Where task.toml has none. Source: Harbor's templates."""


@dataclass(frozen=True, slots=True, kw_only=True)
class HarborFolder:
    """One task."""

    path: Path
    """Of the folder."""
    instruction: str
    """What the policy is asked."""
    image: str
    """Image that task.toml names; empty for none."""
    agent_timeout_s: float
    """Seconds of all commands of the policy together."""
    verifier_timeout_s: float
    """Seconds of the tests."""
    network: bool
    """Whether the policy may reach the network."""

    def files(self) -> dict[str, bytes]:
        """Path below /work -> content of environment/. Raises ConfigError."""
        found = _files(self.path / "environment")
        return {name: content for name, content in found.items() if Path(name).name not in BUILD_FILES}

    def tests(self) -> dict[str, bytes]:
        """Path in /tests -> content; read when it is time to verify. Raises ConfigError."""
        return {f"/tests/{name}": content for name, content in _files(self.path / "tests").items()}


def read_folder(path: Path) -> HarborFolder:
    """A folder. Raises ConfigError, with the file, for what is missing or wrong."""
    if not (path / "tests" / "test.sh").is_file():
        raise _wrong(path / "tests" / "test.sh", "is missing", "a task has tests that write the reward")
    try:
        instruction = (path / "instruction.md").read_text(encoding="utf-8").strip()
        given = tomllib.loads((path / "task.toml").read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise _wrong(Path(error.filename), "is missing", "see Harbor's documentation of tasks") from error
    except (OSError, ValueError) as error:
        raise _wrong(path, f"cannot be read: {error}", "correct the file") from error
    if not instruction:
        raise _wrong(path / "instruction.md", "is empty", "write what is asked")
    environment = _table(path, given, "environment")
    return HarborFolder(
        path=path,
        instruction=moved(instruction.encode()).decode(),
        image=str(environment.get("docker_image", "")),
        agent_timeout_s=_seconds(path, given, "agent"),
        verifier_timeout_s=_seconds(path, given, "verifier"),
        network=bool(environment.get("allow_internet", False)),
    )


def moved(content: bytes) -> bytes:
    """A text with Harbor's folders moved; what is no text is as it was."""
    try:
        text = content.decode()
    except UnicodeDecodeError:
        return content
    for there, here in MOVED.items():
        for behind in ("/", " ", "\n", '"', "'", "`", ";", ".", ",", ")", ":"):
            text = text.replace(there + behind, here + behind)
        if text.endswith(there):
            text = text.removesuffix(there) + here
    return text.encode()


def _files(folder: Path) -> dict[str, bytes]:
    found, size = {}, 0
    for path in sorted(folder.rglob("*")):
        if path.is_symlink():
            raise _wrong(path, "is a link", "tasks hold files alone")
        if path.is_file():
            size += path.stat().st_size
            if size > MAX_BYTES:
                raise _wrong(folder, f"has more than {MAX_BYTES:,} bytes", "put large files into its image")
            found[path.relative_to(folder).as_posix()] = moved(path.read_bytes())
    return found


def _table(path: Path, given: Mapping[str, Any], name: str) -> Mapping[str, Any]:
    found = given.get(name, {})
    if not isinstance(found, Mapping):
        raise _wrong(path / "task.toml", f"{name}={found!r} is no table", f"write [{name}]")
    return found


def _seconds(path: Path, given: Mapping[str, Any], name: str) -> float:
    value = _table(path, given, name).get("timeout_sec", DEFAULT_TIMEOUT_S)
    if isinstance(value, bool) or not isinstance(value, int | float) or not 0 < value < float("inf"):
        raise _wrong(path / "task.toml", f"{name}.timeout_sec={value!r}", "must be seconds above 0")
    return float(value)


def _wrong(path: Path, what: str, remedy: str) -> ConfigError:
    return ConfigError(f"Harbor task {path}: {what}\n  -> {remedy}")
