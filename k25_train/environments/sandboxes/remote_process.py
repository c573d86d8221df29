"""A command that goes on in a sandbox behind another program's command line."""

import asyncio
import contextlib
from collections.abc import Awaitable, Callable

from k25_train.environments.sandboxes.tools import kill_all

_END_S = 5.0


class RemoteProcess:
    """A `Process`."""

    def __init__(self, process: asyncio.subprocess.Process, end: Callable[[], Awaitable[None]]) -> None:
        """`process` is the command line, whose output is limited; `end` kills what it runs within."""
        self._process = process
        self._end = end

    async def write(self, data: bytes) -> None:
        """To its standard input."""
        assert self._process.stdin is not None
        with contextlib.suppress(OSError):
            self._process.stdin.write(data)
            await self._process.stdin.drain()

    async def read_line(self, timeout_s: float) -> bytes:
        """The next line of its standard output, empty at its end. Raises TimeoutError."""
        assert self._process.stdout is not None
        async with asyncio.timeout(timeout_s):
            try:
                return await self._process.stdout.readline()
            except ValueError:
                # A line that is longer than all that may wait.
                kill_all(self._process)
                return b""

    async def close(self) -> None:
        """End it."""
        if self._process.returncode is None:
            await self._end()
            kill_all(self._process)
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(_END_S):
                    await self._drain()
                    await self._process.wait()

    async def _drain(self) -> None:
        """Read what is left: asyncio waits for the end of a pipe that nobody reads, for ever."""
        assert self._process.stdout is not None
        while await self._process.stdout.read(1 << 16):
            pass
