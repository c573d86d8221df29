"""The outer end of the line to a sandbox's first process (`session_init.py`, which has the table of frames).

What comes from within is untrusted: frames that nobody asked for, or that are no frames, end the line, and
nothing of them is ever interpreted but as bytes, small numbers and names of errors.
"""

import asyncio
import contextlib
import socket

_HEADER = 9
_MOST = 1 << 17
"""Bytes of a frame from within."""
PIECE = 1 << 18
"""Bytes of a frame to within."""


class BrokenLineError(Exception):
    """The first process is gone, or says what it must not."""


class Channel:
    """Frames of one order and its answers."""

    def __init__(self, link: "Link", number: int, most_waiting: int) -> None:
        """Use `Link.channel`."""
        self._link = link
        self._number = number
        self._most_waiting = most_waiting
        self._waiting = 0
        self._frames: asyncio.Queue[tuple[bytes, bytes] | None] = asyncio.Queue()

    def send(self, kind: bytes, content: bytes = b"") -> None:
        """An order, or a part of one. Nothing where the line is broken."""
        self._link.send(kind, self._number, content)

    async def send_all(self, kind: bytes, content: bytes) -> None:
        """Content of any length, in pieces, at the pace at which they are taken."""
        for start in range(0, len(content), PIECE):
            self.send(kind, content[start : start + PIECE])
            await self._link.drain()

    async def receive(self) -> tuple[bytes, bytes]:
        """Kind and content of the next frame. Raises BrokenLineError."""
        frame = await self._frames.get()
        if frame is None:
            self._frames.put_nowait(None)
            raise BrokenLineError
        self._waiting -= len(frame[1])
        return frame

    def put(self, frame: tuple[bytes, bytes] | None) -> None:
        """What has come from within; None where nothing will any more. Where more waits than may, it is
        dropped, and what sends it is killed."""
        if frame is not None and self._most_waiting and self._waiting + len(frame[1]) > self._most_waiting:
            self.send(b"K")
            return
        self._waiting += len(frame[1]) if frame else 0
        self._frames.put_nowait(frame)

    def close(self) -> None:
        """What comes from now on is dropped."""
        self._link.forget(self._number)


class Link:
    """The line."""

    def __init__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        """Use `connect`."""
        self._reader = reader
        self._writer = writer
        self._channels: dict[int, Channel] = {}
        self._last = 0
        self.is_broken = False
        """Whether nothing will come any more."""
        self._task = asyncio.create_task(self._read())

    def channel(self, most_waiting: int = 0) -> Channel:
        """A new one, in which so many bytes may wait to be received; 0 where somebody always receives."""
        self._last += 1
        channel = self._channels[self._last] = Channel(self, self._last, most_waiting)
        if self.is_broken:
            channel.put(None)
        return channel

    def send(self, kind: bytes, number: int, content: bytes) -> None:
        """A frame."""
        if not self.is_broken:
            self._writer.write(len(content).to_bytes(4, "big") + kind + number.to_bytes(4, "big") + content)

    async def drain(self) -> None:
        """Wait until there is room for more."""
        with contextlib.suppress(ConnectionError):
            await self._writer.drain()

    def forget(self, number: int) -> None:
        """Drop what comes with a number."""
        self._channels.pop(number, None)

    async def _read(self) -> None:
        try:
            while True:
                head = await self._reader.readexactly(_HEADER)
                size, number = int.from_bytes(head[:4], "big"), int.from_bytes(head[5:], "big")
                if size > _MOST or number > self._last:
                    break
                content = await self._reader.readexactly(size)
                if channel := self._channels.get(number):
                    channel.put((head[4:5], content))
        except (OSError, EOFError):
            pass
        finally:
            self.is_broken = True
            self._writer.close()
            for channel in self._channels.values():
                channel.put(None)

    async def close(self) -> None:
        """Close it; twice is as once."""
        self._task.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await self._task


async def connect(line: socket.socket, ports: int, timeout_s: float) -> tuple[Link, list[socket.socket]]:
    """The line, once the first process is there, with the sockets that it has opened within.

    Args:
        line: this end of the pair; it is closed with the line, or here if that cannot be had.
        ports: how many sockets there should be.
        timeout_s: how long to wait.

    Raises BrokenLineError if it ends instead, TimeoutError.
    """
    loop = asyncio.get_running_loop()
    line.setblocking(False)
    is_there = loop.create_future()

    def heard() -> None:
        if not is_there.done():
            is_there.set_result(None)

    loop.add_reader(line, heard)
    try:
        async with asyncio.timeout(timeout_s):
            await is_there
    except BaseException:
        loop.remove_reader(line)
        line.close()
        raise
    loop.remove_reader(line)
    try:
        hello, files, _, _ = socket.recv_fds(line, _HEADER, ports)
    except OSError:
        hello, files = b"", []
    listening = [socket.socket(fileno=file) for file in files]
    if hello[4:5] != b"H" or len(listening) != ports:
        for each in (line, *listening):
            each.close()
        raise BrokenLineError
    reader, writer = await asyncio.open_connection(sock=line)
    return Link(reader, writer), listening
