"""How messages pass: ZeroMQ, one ROUTER of the first rank and a DEALER of each shard.

    first rank  ROUTER ◄──► DEALER  shard 0, incarnation 2      a shard's name has its incarnation, so that
                       ◄──► DEALER  shard 1, incarnation 0      what a dead one still says is of nobody

Queues are bounded: whoever sends more than the other takes waits.
"""

import asyncio
import shutil
from collections import defaultdict
from pathlib import Path
from typing import Protocol

import zmq
import zmq.asyncio

from k25_train.rollout.records import Record, records_in

QUEUED = 10_000
"""Messages that wait for one peer. Our choice."""
FULL_S = 0.01
"""Between two looks at a queue that is full. Our choice."""


class Link(Protocol):
    """One end that sends to and receives from a peer by name; another data plane is another class."""

    async def send(self, peer: bytes, message: Record) -> None:
        """Send to a peer; waits while its queue is full. What nobody takes any more is dropped."""

    async def receive(self) -> tuple[bytes, Record]:
        """The next message, and who sent it."""

    def close(self) -> None:
        """Drop what was not sent."""


class FirstRankLink:
    """The first rank's end: of all shards."""

    def __init__(self, address: str, folder: Path | None = None) -> None:
        """
        Args:
            address: as ZeroMQ has it; of TCP without a port for a free one.
            folder: of the address alone, removed with it.
        """
        self._folder = folder
        self._sending: defaultdict[bytes, asyncio.Lock] = defaultdict(asyncio.Lock)
        self._socket = zmq.asyncio.Context.instance().socket(zmq.ROUTER)
        self._socket.set_hwm(QUEUED)
        self._socket.setsockopt(zmq.LINGER, 0)
        self._socket.setsockopt(zmq.ROUTER_MANDATORY, 1)
        self.key = ""
        """What shards need to connect; empty where the address is of this machine alone."""
        if address.startswith("tcp://"):
            # Encrypted, and of those alone whom the first rank has told its key.
            public, secret = zmq.curve_keypair()
            self._socket.curve_publickey, self._socket.curve_secretkey = public, secret
            self._socket.curve_server = True
            self.key = public.decode()
        if address.startswith("tcp://") and address.count(":") == 1:
            address = f"{address}:{self._socket.bind_to_random_port(address)}"
        else:
            self._socket.bind(address)
        self.address = address
        """Where shards connect to."""

    async def send(self, peer: bytes, message: Record) -> None:
        """See `Link`."""
        data = message.to_bytes()
        # One after another: what waits is not overtaken.
        async with self._sending[peer]:
            while not await self._has_sent(peer, data):
                # A ROUTER does not wait for room: others' queues have some.
                await asyncio.sleep(FULL_S)

    async def _has_sent(self, peer: bytes, data: bytes) -> bool:
        """Send, if the peer's queue is not full; nothing to one that is gone."""
        try:
            await self._socket.send_multipart([peer, data])
        except zmq.Again:
            return False
        except zmq.ZMQError as error:
            if error.errno != zmq.EHOSTUNREACH:
                raise
        return True

    async def receive(self) -> tuple[bytes, Record]:
        """See `Link`. Raises ValueError for what is no message."""
        peer, data = await self._socket.recv_multipart()
        return peer, message_in(data)

    def close(self) -> None:
        """See `Link`."""
        self._socket.close()
        if self._folder is not None:
            shutil.rmtree(self._folder, ignore_errors=True)


class ShardLink:
    """A shard's end."""

    def __init__(self, address: str, name: str, key: str = "") -> None:
        """
        Args:
            address: of the first rank's end.
            name: which that knows this shard by.
            key: the first rank's; empty for none.
        """
        self._socket = zmq.asyncio.Context.instance().socket(zmq.DEALER)
        self._socket.set_hwm(QUEUED)
        self._socket.setsockopt(zmq.LINGER, 1000)
        self._socket.setsockopt(zmq.IDENTITY, name.encode())
        if key:
            self._socket.curve_serverkey = key.encode()
            self._socket.curve_publickey, self._socket.curve_secretkey = zmq.curve_keypair()
        self._socket.connect(address)

    async def send(self, message: Record) -> None:
        """Send to the first rank; waits while the queue is full."""
        await self._socket.send(message.to_bytes())

    async def receive(self) -> Record:
        """The next message. Raises ValueError for what is none."""
        return message_in(await self._socket.recv())

    def close(self) -> None:
        """Drop what was not sent within a second."""
        self._socket.close()


def message_in(data: bytes) -> Record:
    """The one record of a message. Raises ValueError."""
    found = next(records_in(data), None)
    if found is None:
        raise ValueError(f"{len(data)} bytes that are no message")
    return found[0]


def local_address(folder: Path) -> str:
    """An address that only this machine's processes reach."""
    return f"ipc://{folder / 'shards'}"
