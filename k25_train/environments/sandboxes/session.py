"""One sandbox of bubblewrap, from outside: orders to its first process, and what comes of them."""

import asyncio
import contextlib
import marshal
import os
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping, Sequence
from pathlib import PurePosixPath

from k25_train.environments.sandboxes.base import Ending, Finished, SandboxError, SandboxLimits
from k25_train.environments.sandboxes.cgroups import Group
from k25_train.environments.sandboxes.link import BrokenLineError, Channel, Link
from k25_train.environments.sandboxes.room import Room

_GRACE_S = 5.0
"""Seconds that the first process gets to end what is out of time; then the sandbox is ended."""
_FILES_S = 60.0
"""Seconds that files take to come and go at most."""
_KILLED = 128 + 9
_ENDINGS = {"exited": Ending.EXITED, "time": Ending.OUT_OF_TIME, "output": Ending.TOO_MUCH_OUTPUT}
_FAULTS: Mapping[str, type[Exception]] = {
    "FileNotFoundError": FileNotFoundError,
    "NotADirectoryError": FileNotFoundError,
    "ValueError": ValueError,
    "UnicodeEncodeError": ValueError,
}
_OWN_ROOM = 1 << 16
"""Bytes that the first process may say itself, such as that a command cannot be started."""
_GONE = b"the sandbox is gone: what ran in it has ended it\n"


class BubblewrapProcess:
    """A `Process` in it."""

    def __init__(self, channel: Channel) -> None:
        """`channel` has got its order."""
        self._channel = channel
        self._text = bytearray()
        self._is_over = False

    async def write(self, data: bytes) -> None:
        """To its standard input."""
        await self._channel.send_all(b"I", data)

    async def read_line(self, timeout_s: float) -> bytes:
        """The next line of its standard output, empty at its end. Raises TimeoutError."""
        async with asyncio.timeout(timeout_s):
            while b"\n" not in self._text and not self._is_over:
                try:
                    kind, content = await self._channel.receive()
                except BrokenLineError:
                    kind, content = b"X", b""
                if kind == b"O":
                    self._text += content
                self._is_over = kind == b"X"
        end = self._text.find(b"\n") + 1 or len(self._text)
        line = bytes(self._text[:end])
        del self._text[:end]
        return line

    async def close(self) -> None:
        """End it."""
        self._channel.send(b"K")
        self._channel.close()
        self._is_over = True


class BubblewrapSession:
    """A `SandboxSession`."""

    def __init__(self, name: str, limits: SandboxLimits, link: Link, group: Group, room: Room) -> None:
        """Use `BubblewrapSandboxes.open`."""
        self.name = name
        self._limits = limits
        self._link = link
        self._group = group
        self._room = room
        self._has_run = False
        self._why_closed = ""
        self._closing: asyncio.Task[None] | None = None
        self.teardown: Callable[[], Awaitable[None]]
        """Ends processes and group."""

    def why_closed(self, reason: str) -> None:
        """From now on methods raise an error with this reason."""
        self._why_closed = self._why_closed or reason

    async def put(self, path: str, content: bytes) -> None:
        """A file of its specification; those with an absolute path were there from the start."""
        if not path.startswith("/"):
            await self.write(path, content)

    async def run(
        self,
        command: Sequence[str],
        *,
        timeout_s: float,
        stdin: bytes = b"",
        variables: Mapping[str, str] | None = None,
    ) -> Finished:
        """Run a command in `WORK` until it ends, or a limit ends it; what it started otherwise goes on."""
        if self._is_destroyed():
            return self._room.count(_finished(Ending.DESTROYED, _KILLED, b"", _GONE), False)
        kills = self._group.memory_kills()
        channel = self._order(command, variables, timeout_s, self._limits.output_bytes, not stdin)
        streams = {b"O": bytearray(), b"E": bytearray()}
        ending, status, is_full = Ending.DESTROYED, _KILLED, False
        try:
            async with asyncio.timeout(timeout_s + _GRACE_S):
                if stdin:
                    await channel.send_all(b"I", stdin)
                    channel.send(b"C")
                ending, status, is_full = await self._ended(channel, streams)
        except BrokenLineError:
            self._is_destroyed()
            streams[b"E"] += _GONE
        except TimeoutError:
            # Its first process does not answer: there is no other way to end what runs.
            ending = Ending.OUT_OF_TIME
            self._link.is_broken = True
            await self._end()
        except BaseException:
            channel.send(b"K")
            raise
        finally:
            channel.close()
        if status and ending is not Ending.OUT_OF_TIME and self._group.memory_kills() > kills:
            ending = Ending.OUT_OF_MEMORY
        finished = _finished(ending, status, bytes(streams[b"O"]), bytes(streams[b"E"]))
        return self._room.count(finished, is_full)

    async def _ended(self, channel: Channel, streams: Mapping[bytes, bytearray]) -> tuple[Ending, int, bool]:
        """How a command ended, with what it printed in `streams`."""
        room = self._limits.output_bytes
        while True:
            kind, content = await channel.receive()
            if kind == b"X":
                try:
                    ending, status, is_full = content.decode("ascii").split()
                    return _ENDINGS[ending], min(int(status), 255), is_full == "1"
                except (ValueError, KeyError) as error:
                    raise BrokenLineError from error
            if kind not in streams or len(content) > room + _OWN_ROOM:
                raise BrokenLineError
            room -= len(content)
            streams[kind] += content

    async def start(
        self, command: Sequence[str], variables: Mapping[str, str] | None = None
    ) -> BubblewrapProcess:
        """Start a command that goes on. It is killed once more than `output_bytes` of it wait to be read."""
        self._is_destroyed()
        return BubblewrapProcess(self._order(command, variables, 0.0, 0, False))

    def _order(
        self,
        command: Sequence[str],
        variables: Mapping[str, str] | None,
        seconds: float,
        room: int,
        closes: bool,
    ) -> Channel:
        self._has_run = True
        channel = self._link.channel(0 if room else self._limits.output_bytes)
        given = {str(key): str(value) for key, value in (variables or {}).items()}
        order = ([str(word) for word in command], given, float(seconds), room, b"", closes)
        channel.send(b"R", marshal.dumps(order))
        return channel

    async def write(self, path: str, content: bytes) -> None:
        """Write a file, with its folders. Raises OSError where the sandbox has no room or no place for it."""
        if self._is_destroyed():
            raise OSError(_GONE.decode().strip())
        async with self._files() as channel:
            channel.send(b"W", _encoded(path))
            await channel.send_all(b"w", content)
            channel.send(b"c")
            async for _ in _answers(channel):
                raise BrokenLineError

    async def read(self, path: str, max_bytes: int) -> bytes:
        """Read a regular file. Raises FileNotFoundError, ValueError for one that is longer or no file, and
        other OSErrors for one that may not be read."""
        if self._is_destroyed():
            raise FileNotFoundError(_GONE.decode().strip())
        found = bytearray()
        async with self._files() as channel:
            channel.send(b"G", marshal.dumps((os.fsdecode(_encoded(path)), max_bytes)))
            async for _, content in _answers(channel):
                found += content
                if len(found) > max_bytes:
                    raise BrokenLineError
        return bytes(found)

    async def snapshot(self, max_bytes: int) -> dict[str, bytes]:
        """Path below `WORK` -> content of all regular files, no links or devices, where the folder is
        readable; nothing of a sandbox that was destroyed from within. Raises ValueError for more bytes than
        that, names included."""
        if self._is_destroyed():
            return {}
        found: dict[str, bytearray] = {}
        path, left = "", max_bytes
        try:
            async with self._files() as channel:
                channel.send(b"S", str(max_bytes).encode())
                async for kind, content in _answers(channel):
                    left -= len(content)
                    if left < 0:
                        raise BrokenLineError
                    if kind == b"N":
                        path = _plain(content)
                        found[path] = bytearray()
                    else:
                        found[path] += content
        except (FileNotFoundError, KeyError) as error:
            raise SandboxError(f"sandbox {self.name} changed while it was read: {error}") from error
        return {path: bytes(content) for path, content in found.items()}

    @contextlib.asynccontextmanager
    async def _files(self) -> AsyncIterator[Channel]:
        channel = self._link.channel()
        try:
            async with asyncio.timeout(_FILES_S):
                yield channel
        except BrokenLineError as error:
            self._is_destroyed()
            raise OSError(_GONE.decode().strip()) from error
        except TimeoutError as error:
            raise SandboxError(f"sandbox {self.name} did not hand over files in {_FILES_S:.0f} s") from error
        finally:
            channel.close()

    def _is_destroyed(self) -> bool:
        """Whether what ran in it has ended it. Raises SandboxError if something else has."""
        if self._why_closed:
            raise SandboxError(f"sandbox {self.name} {self._why_closed}")
        if self._link.is_broken and not self._has_run:
            raise SandboxError(f"sandbox {self.name} has ended, and nothing had run in it")
        return self._link.is_broken

    async def close(self) -> None:
        """End it with all that runs in it. Twice is as once."""
        self.why_closed("is closed")
        await self._end()

    async def _end(self) -> None:
        if self._closing is None:
            self._closing = asyncio.create_task(self._ending())
        await asyncio.shield(self._closing)

    async def _ending(self) -> None:
        for cause, count in (
            ("processes", self._group.process_refusals()),
            ("processors", self._group.throttled()),
        ):
            self._room.contained[cause] += bool(count)
        await self._link.close()
        await self.teardown()
        self._room.leave(self)


async def _answers(channel: Channel) -> AsyncIterator[tuple[bytes, bytes]]:
    """Frames up to the last one. Raises what that says."""
    while True:
        kind, content = await channel.receive()
        if kind == b".":
            return
        if kind == b"F":
            name, _, text = content.decode(errors="replace").partition("\n")
            raise _FAULTS.get(name, OSError)(text)
        if kind not in (b"D", b"N"):
            raise BrokenLineError
        yield kind, content


def _encoded(path: str) -> bytes:
    """A path as the system has it. Raises ValueError for one that cannot be."""
    return os.fsencode(path)


def _plain(content: bytes) -> str:
    """A path below `WORK`. Raises BrokenLineError for what leaves it."""
    path = PurePosixPath(os.fsdecode(content))
    if path.is_absolute() or ".." in path.parts or not path.parts or b"\0" in content:
        raise BrokenLineError
    return str(path)


def _finished(ending: Ending, status: int, stdout: bytes, stderr: bytes) -> Finished:
    return Finished(ending=ending, status=status, stdout=stdout, stderr=stderr)
