"""Access to a node's operating system: files, file systems and output of commands.

Preflight reads a node nowhere else. Tests replace the root and the commands by recordings, so the same code
reads a real and a recorded node.
"""

import contextlib
import importlib.util
import os
import re
import shutil
import socket
import subprocess
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

COMMAND_TIMEOUT_S = 30.0
"""Time limit of a command. A healthy nvidia-smi needs seconds; with a GPU off the bus it may hang forever."""


class AbsentError(Exception):
    """The node does not have what should be read, so there is nothing to judge."""


class BrokenError(Exception):
    """What should be read exists but does not work, which is a finding in itself."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Missing:
    """Placeholder for something that could not be read, with the reason."""

    reason: str


def try_to_read[**Arguments, Facts](
    read: Callable[Arguments, Facts], *args: Arguments.args, **kwargs: Arguments.kwargs
) -> Facts | Missing:
    """What `read` returns, or why the node does not have it or it does not work."""
    try:
        return read(*args, **kwargs)
    except (AbsentError, BrokenError) as error:
        return Missing(reason=str(error))


@dataclass(frozen=True, slots=True, kw_only=True)
class Usage:
    """Size and free space of a file system."""

    total_bytes: int
    free_bytes: int


def run_command(words: Sequence[str]) -> str:
    """Standard output of a command.

    Raises:
        AbsentError: the command is not installed.
        BrokenError: the command fails, or does not answer in time.
    """
    try:
        done = subprocess.run(
            words,
            capture_output=True,
            encoding="utf-8",
            timeout=COMMAND_TIMEOUT_S,
            check=False,
            errors="replace",
            env={**os.environ, "LC_ALL": "C"},
        )
    except FileNotFoundError as error:
        raise AbsentError(f"{words[0]} is not installed") from error
    except OSError as error:
        raise BrokenError(f"{words[0]} cannot be run: {error.strerror}") from error
    except subprocess.TimeoutExpired as error:
        raise BrokenError(f"{' '.join(words)}: no answer in {COMMAND_TIMEOUT_S:g} s") from error
    if done.returncode:
        printed = " ".join((done.stdout + done.stderr).split())
        raise BrokenError(f"{' '.join(words)}: status {done.returncode}: {printed}")
    return done.stdout


@dataclass(frozen=True, slots=True, kw_only=True)
class Build:
    """What the installed packages are built for; None for what is not installed."""

    cuda: str | None
    """CUDA version of torch; None if it is built for CPUs only."""
    nccl: Mapping[str, str]
    """Package of NCCL -> its version: one for each major version of CUDA."""
    nvshmem: str | None
    deep_ep: str | None
    transformer_engine: str | None = None


def read_build() -> Build:
    """Of this process's packages. torch is not imported: a file of it says what it is built for."""
    spec = importlib.util.find_spec("torch")
    file = Path(spec.origin).with_name("version.py") if spec is not None and spec.origin else None
    text = file.read_text(encoding="utf-8") if file is not None and file.exists() else ""
    cuda = re.search(r"^cuda\b[^=]*= ['\"]([\d.]+)['\"]", text, re.MULTILINE)

    def installed(name: str) -> str | None:
        try:
            return version(name)
        except PackageNotFoundError:
            return None

    majors = ("cu11", "cu12", "cu13")
    nccl = {name: found for major in majors if (found := installed(name := f"nvidia-nccl-{major}"))}
    shmem = [found for major in majors if (found := installed(f"nvidia-nvshmem-{major}"))]
    return Build(
        cuda=cuda[1] if cuda else None,
        nccl=nccl,
        nvshmem=shmem[0] if shmem else None,
        deep_ep=installed("deep_ep"),
        transformer_engine=installed("transformer_engine"),
    )


def look_up(name: str) -> list[str]:
    """Addresses of a name, sorted, as libraries resolve it; empty if it does not resolve."""
    try:
        return sorted({str(found[4][0]) for found in socket.getaddrinfo(name, None)})
    except OSError:
        return []


def look_back(address: str) -> str | None:
    """Name of an address; None if it has none."""
    try:
        return socket.gethostbyaddr(address)[0]
    except OSError:
        return None


def resolve_own_name() -> str | None:
    """IPv4 address of this host's name, resolved as libraries do; None if it does not resolve."""
    try:
        return socket.gethostbyname(socket.gethostname())
    except OSError:
        return None


def file_system_usage(path: Path) -> Usage:
    """Usage of the file system of `path`, which need not exist yet."""
    while not path.exists():
        path = path.parent
    usage = shutil.disk_usage(path)
    return Usage(total_bytes=usage.total, free_bytes=usage.free)


@dataclass(frozen=True, slots=True, kw_only=True)
class System:
    """The operating system of this node, or of a recorded one."""

    root: Path = Path("/")
    """Root of the file tree."""
    run: Callable[[Sequence[str]], str] = run_command
    """Words of a command -> its output; raises `AbsentError` or `BrokenError`."""
    resolve: Callable[[], str | None] = resolve_own_name
    """IPv4 address of the host's name; None if it does not resolve."""
    host: Callable[[], str] = socket.gethostname
    """This host's name."""
    lookup: Callable[[str], list[str]] = look_up
    """Name -> addresses; none if it does not resolve."""
    reverse: Callable[[str], str | None] = look_back
    """Address -> name; None if it has none."""
    build: Callable[[], Build] = read_build
    """What the installed packages are built for."""
    environment: Mapping[str, str] = field(default_factory=lambda: dict(os.environ))
    """Environment variables of this process."""
    usage: Callable[[Path], Usage] = file_system_usage
    """Path -> usage of its file system."""

    def read(self, path: str) -> str | None:
        """Contents of a file without surrounding white space; None if it does not exist or cannot be read.

        The kernel shows unused table rows as files that cannot be read, so both mean the same.
        """
        try:
            return (self.root / path).read_text(encoding="utf-8", errors="replace").strip()
        except OSError:
            return None

    def read_bytes(self, path: str) -> bytes:
        """Contents of a binary file; empty if it does not exist or cannot be read."""
        try:
            return (self.root / path).read_bytes()
        except OSError:
            return b""

    def names(self, folder: str) -> list[str]:
        """Sorted names in a folder, numbers numerically; empty if there is no such folder."""
        try:
            names = [entry.name for entry in (self.root / folder).iterdir()]
        except OSError:
            return []
        return sorted(names, key=lambda name: (not name.isdigit(), int(name) if name.isdigit() else 0, name))

    def target(self, path: str) -> str | None:
        """Where a link leads, with all links on the way resolved, from the root; None if nowhere."""
        try:
            return str((self.root / path).resolve(strict=True).relative_to(self.root.resolve()))
        except (OSError, ValueError):
            return None

    def bytes_in(self, folder: str) -> int:
        """Total size of all files below a folder; 0 if there is no such folder."""
        found = 0
        for parent, _, names in (self.root / folder).walk():
            for name in names:
                # Files may be deleted meanwhile.
                with contextlib.suppress(OSError):
                    found += (parent / name).lstat().st_size
        return found
