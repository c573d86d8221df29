"""Sandboxes that another program has, behind its command line: containers, pods, instances of Apptainer.

    open ─► create, named after its label ─► run, write, read, snapshot: `exec` of a shell within ─► remove

A driver knows the program; all else is the same for each. Needs `sh`, `timeout`, `cat`, `wc` and `tar` in the
image, as Debian's, Alpine's and their descendants have them.
"""

import asyncio
import itertools
import os
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Protocol

from k25_train.environments.sandboxes import owners
from k25_train.environments.sandboxes.base import (
    WORK,
    Ending,
    Finished,
    SandboxError,
    SandboxLimits,
    SandboxSpec,
)
from k25_train.environments.sandboxes.folders import check_folders
from k25_train.environments.sandboxes.remote_process import RemoteProcess
from k25_train.environments.sandboxes.room import Room
from k25_train.environments.sandboxes.tar_files import files_of
from k25_train.environments.sandboxes.tools import Called, call

PREFIX = "k25-sandbox-"
"""First part of the names of what is created; the rest is the label."""
_SYSTEM = {f"/{name}" for name in "bin boot dev etc lib lib64 proc root run sbin sys usr var".split()}
_GRACE_S = 30.0
"""Seconds that a command line may take beside what it runs. Our choice: clusters are slow at times."""
_FILES_S = 120.0
_KILLED = 128 + 9
_NO_FILE, _NOT_THAT = 44, 45
_RUN = 'cd "$1" && echo $$ > "$2" && echo "$2" >&2 && shift 2 && exec timeout -s KILL "$@"'
# `-9 --` is no option of dash.
_KILL = 'kill -s KILL -- "-$(cat "$0")" "$(cat "$0")"'
_WRITE = 'cd "$1" && mkdir -p "$(dirname "$0")" && cat > "$0"'
_READ = (
    f'cd "$2" && [ -e "$0" ] || exit {_NO_FILE}; '
    f'[ -f "$0" ] && [ "$(wc -c < "$0")" -le "$1" ] || exit {_NOT_THAT}; cat < "$0"'
)
_MEMORY = "cat /sys/fs/cgroup/memory.events /sys/fs/cgroup/memory/memory.oom_control 2>/dev/null; true"
_GONE = b"the sandbox is gone: what ran in it has ended it\n"


class Driver(Protocol):
    """Knows one program."""

    async def create(self, name: str, spec: SandboxSpec, limits: SandboxLimits) -> None:
        """Create and start what has the name. Raises SandboxError."""

    def inside(self, name: str, command: Sequence[str]) -> list[str]:
        """What runs a command within, with its streams and its status."""

    async def remove(self, name: str) -> None:
        """Remove it with all that is in it; nothing where it is gone. Raises SandboxError."""

    async def names(self) -> list[str]:
        """All that begin with `PREFIX`, of every owner, running or not. Raises SandboxError."""

    async def is_alive(self, name: str) -> bool:
        """Whether it runs. Raises SandboxError where this cannot be said."""


def places(spec: SandboxSpec) -> list[str]:
    """Folders of a sandbox that can be written to: of commands, and of absolute paths that it is given.

    Raises SandboxError for paths in a system's folders.
    """
    given = {f"/{path.split('/')[1]}" for path in spec.files if path.startswith("/")}
    if wrong := given & _SYSTEM:
        raise SandboxError(f"sandbox {spec.name} cannot be given files in {', '.join(sorted(wrong))}")
    return sorted({WORK, "/tmp"} | given)


class RemoteSession:
    """A `SandboxSession`."""

    def __init__(self, name: str, place: str, driver: Driver, limits: SandboxLimits, room: Room) -> None:
        """`name` is the task's, `place` what the driver has created."""
        self.name = name
        self._place = place
        self._driver = driver
        self._limits = limits
        self._room = room
        self._number = itertools.count()
        self._has_run = False
        self._is_destroyed = False
        self._kills = 0
        self._why_closed = ""
        self._closing: asyncio.Task[None] | None = None

    def why_closed(self, reason: str) -> None:
        """From now on methods raise an error with this reason."""
        self._why_closed = self._why_closed or reason

    async def put(self, path: str, content: bytes) -> None:
        """A file of its specification; those with an absolute path are read-only from then on."""
        await self.write(path, content)
        if path.startswith("/"):
            await self.protect(path)

    async def run(
        self,
        command: Sequence[str],
        *,
        timeout_s: float,
        stdin: bytes = b"",
        variables: Mapping[str, str] | None = None,
    ) -> Finished:
        """Run a command in `WORK` until it ends, or a limit ends it; what it started otherwise goes on."""
        self._check()
        if self._is_destroyed:
            return self._finished(Ending.DESTROYED, _KILLED, b"", _GONE)
        mark, wrapped = self._wrapped(command, variables, timeout_s)
        began = time.monotonic()
        ending, done = Ending.EXITED, Called(status=_KILLED, stdout=b"", stderr=f"{mark}\n".encode())
        is_over = False
        try:
            done = await call(
                self._driver.inside(self._place, wrapped),
                timeout_s=timeout_s + _GRACE_S,
                stdin=stdin,
                most=self._limits.output_bytes + len(mark) + 1,
            )
            is_over = not done.is_too_much
        except TimeoutError:
            ending = Ending.OUT_OF_TIME
        finally:
            if not is_over:
                await asyncio.shield(self._within(["sh", "-c", _KILL, mark]))
        first, _, stderr = done.stderr.partition(b"\n")
        if first.decode(errors="replace") != mark and not done.is_too_much:
            return await self._did_not_start(done)
        if done.is_too_much:
            ending = Ending.TOO_MUCH_OUTPUT
        elif done.status == _KILLED and time.monotonic() - began >= timeout_s:
            ending = Ending.OUT_OF_TIME
        elif done.status == _KILLED and await self._lost_memory():
            ending = Ending.OUT_OF_MEMORY
        return self._finished(ending, _KILLED if done.status < 0 else done.status, done.stdout, stderr)

    def _wrapped(
        self, command: Sequence[str], variables: Mapping[str, str] | None, seconds: float
    ) -> tuple[str, list[str]]:
        """The file with its process's number, which it names on its errors first, and the whole command."""
        self._has_run = True
        mark = f"/tmp/.k25-{os.urandom(8).hex()}-{next(self._number)}"
        given = [f"{key}={value}" for key, value in (variables or {}).items()]
        return mark, ["sh", "-c", _RUN, "sh", WORK, mark, f"{seconds:g}", "env", *given, *command]

    async def _did_not_start(self, done: Called) -> Finished:
        if await self._driver.is_alive(self._place):
            said = done.stderr.decode(errors="replace").strip()[-400:] or "nothing"
            raise SandboxError(f"sandbox {self.name} starts no command; it says: {said}")
        self._is_destroyed = True
        return self._finished(Ending.DESTROYED, _KILLED, b"", _GONE)

    async def _lost_memory(self) -> bool:
        """Whether the kernel has killed something for memory since the last time."""
        done = await self._within(["sh", "-c", _MEMORY])
        lines = done.stdout.decode(errors="replace").splitlines()
        numbers = [line.split()[1] for line in lines if line.startswith("oom_kill ")]
        kills = sum(int(number) for number in numbers if number.isdigit())
        before, self._kills = self._kills, kills
        return kills > before

    def _finished(self, ending: Ending, status: int, stdout: bytes, stderr: bytes) -> Finished:
        finished = Finished(ending=ending, status=status, stdout=stdout, stderr=stderr)
        return self._room.count(finished, b"No space left on device" in stderr)

    async def _within(self, command: Sequence[str], stdin: bytes = b"", most: int = 1 << 16) -> Called:
        try:
            return await call(
                self._driver.inside(self._place, command), timeout_s=_FILES_S, stdin=stdin, most=most
            )
        except TimeoutError as error:
            raise SandboxError(f"sandbox {self.name} did not answer in {_FILES_S:g} s") from error

    async def start(
        self, command: Sequence[str], variables: Mapping[str, str] | None = None
    ) -> RemoteProcess:
        """Start a command that goes on. It is killed once more than `output_bytes` of it wait to be read."""
        self._check()
        mark, wrapped = self._wrapped(command, variables, self._limits.ttl_s)
        process = await asyncio.create_subprocess_exec(
            *self._driver.inside(self._place, wrapped),
            stdin=asyncio.subprocess.PIPE,
            stdout=asyncio.subprocess.PIPE,
            stderr=asyncio.subprocess.DEVNULL,
            limit=self._limits.output_bytes,
            start_new_session=True,
        )

        async def end() -> None:
            await self._within(["sh", "-c", _KILL, mark])

        return RemoteProcess(process, end)

    async def write(self, path: str, content: bytes) -> None:
        """Write a file, with its folders. Raises OSError where the sandbox has no room or no place for it."""
        self._check()
        done = await self._within(["sh", "-c", _WRITE, path, WORK], content)
        if done.status:
            raise OSError(
                done.stderr.decode(errors="replace").strip()[-400:] or f"{path!r}: status {done.status}"
            )

    async def protect(self, path: str) -> None:
        """Take the right to write to a file away: a hint, as it belongs to whoever runs commands here."""
        await self._within(["chmod", "a-w", path])

    async def read(self, path: str, max_bytes: int) -> bytes:
        """Read a regular file. Raises FileNotFoundError, ValueError for one that is longer or no file, and
        other OSErrors for one that may not be read."""
        self._check()
        done = await self._within(["sh", "-c", _READ, path, str(max_bytes), WORK], most=max_bytes + (1 << 12))
        if done.status == _NO_FILE or self._is_destroyed:
            raise FileNotFoundError(path)
        if done.status == _NOT_THAT or len(done.stdout) > max_bytes:
            raise ValueError(f"{path!r} is longer than {max_bytes} bytes, or no file")
        if done.status:
            raise OSError(done.stderr.decode(errors="replace").strip()[-400:])
        return done.stdout

    async def snapshot(self, max_bytes: int) -> dict[str, bytes]:
        """Path below `WORK` -> content of all regular files, no links or devices, where the folder is
        readable; nothing of a sandbox that was destroyed from within. Raises ValueError for more bytes than
        that, names included."""
        self._check()
        # A tar has up to a kilobyte beside each file.
        done = await self._within(["tar", "-C", WORK, "-cf", "-", "."], most=2 * max_bytes + (1 << 16))
        if not done.stdout and not await self._driver.is_alive(self._place):
            self._is_destroyed = self._has_run
            return {}
        if done.is_too_much:
            raise ValueError(f"there are more files than {max_bytes} bytes hold")
        return await asyncio.to_thread(files_of, done.stdout, max_bytes)

    def _check(self) -> None:
        if self._why_closed:
            raise SandboxError(f"sandbox {self.name} {self._why_closed}")

    async def close(self) -> None:
        """End it with all that runs in it. Twice is as once."""
        self.why_closed("is closed")
        if self._closing is None:
            self._closing = asyncio.create_task(self._end())
        await asyncio.shield(self._closing)

    async def _end(self) -> None:
        try:
            await self._driver.remove(self._place)
        finally:
            self._room.leave(self)


class RemoteSandboxes:
    """`Sandboxes` of a driver."""

    def __init__(
        self,
        driver: Driver,
        limits: SandboxLimits,
        *,
        owner: owners.Owner,
        most: int,
        secret: Sequence[Path],
    ) -> None:
        """Arguments are those of `opening.open_sandboxes`."""
        self._secret = secret
        self._driver = driver
        self._limits = limits
        self._owner = owner
        self._room = Room(most, limits.ttl_s)

    @property
    def contained(self) -> Mapping[str, int]:
        """How often which limit has held, by cause."""
        return self._room.contained

    async def open(self, spec: SandboxSpec) -> RemoteSession:
        """A new one. Waits while there are as many as there may be."""
        check_folders(spec, self._secret)
        return await self._room.admit(spec, self._opened)

    async def _opened(self, spec: SandboxSpec) -> RemoteSession:
        if spec.ports:
            raise SandboxError(
                f"sandbox {spec.name} is to reach ports {spec.ports} of this host, which only "
                "environment.sandbox.kind=bubblewrap can without a network"
            )
        place = PREFIX + self._owner.label(self._limits.ttl_s)
        try:
            await self._driver.create(place, spec, self._limits)
        except BaseException:
            # It may be there, half made.
            await asyncio.shield(self._driver.remove(place))
            raise
        return RemoteSession(spec.name, place, self._driver, self._limits, self._room)

    async def reconcile(self) -> int:
        """Remove those whose owner is gone, or whose time is over; returns how many these were."""
        here, now = owners.machine(), time.time()
        names = [
            name
            for name in await self._driver.names()
            if owners.may_be_removed(name.removeprefix(PREFIX), here, now)
        ]
        for name in names:
            await self._driver.remove(name)
        return len(names)

    async def close(self) -> None:
        """Close all that are open."""
        await self._room.close()
