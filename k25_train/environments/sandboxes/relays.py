"""Brings connections from a sandbox's loopback to one port of this machine's, without a network.

program ─► 127.0.0.1:PORT within ═ socket that was handed out ═ this process ─► 127.0.0.1:PORT
"""

import asyncio
import contextlib
import socket

_MOST = 64
"""Connections at once of one sandbox and port; further ones are closed."""


class Relay:
    """One port of one sandbox."""

    def __init__(self, port: int) -> None:
        """`port` of this machine's loopback."""
        self._port = port
        self._server: asyncio.Server | None = None
        self._running: set[asyncio.Task[None]] = set()

    async def start(self, listening: socket.socket) -> None:
        """Take connections of the socket, which is closed with this."""
        self._server = await asyncio.start_server(self._serve, sock=listening)

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        task = asyncio.current_task()
        assert task is not None
        if len(self._running) >= _MOST:
            writer.close()
            return
        self._running.add(task)
        other: asyncio.StreamWriter | None = None
        try:
            back, other = await asyncio.open_connection("127.0.0.1", self._port)
            async with asyncio.TaskGroup() as both:
                both.create_task(_pump(reader, other))
                both.create_task(_pump(back, writer))
        except* OSError:
            pass
        finally:
            self._running.discard(task)
            writer.close()
            if other:
                other.close()

    async def close(self) -> None:
        """End it with all its connections."""
        if self._server:
            self._server.close()
        for task in list(self._running):
            task.cancel()
        await asyncio.gather(*self._running, return_exceptions=True)


async def _pump(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    while piece := await reader.read(1 << 16):
        writer.write(piece)
        await writer.drain()
    with contextlib.suppress(OSError):
        writer.write_eof()
