"""How many sandboxes are open, for how long, and what their limits have held: the same for every kind."""

import asyncio
from collections import Counter
from collections.abc import Awaitable, Callable
from typing import Protocol

from k25_train.environments.sandboxes.base import Ending, Finished, SandboxError, SandboxSpec


class Closing(Protocol):
    """What is open."""

    async def close(self) -> None:
        """End it."""


class Opened(Closing, Protocol):
    """A sandbox that was just made."""

    def why_closed(self, reason: str) -> None:
        """From now on methods raise an error with this reason."""

    async def put(self, path: str, content: bytes) -> None:
        """A file of its specification, unless it has it already. Raises OSError."""


class Room:
    """Places for sandboxes. Whoever has waited longest gets the next."""

    def __init__(self, most: int, ttl_s: float) -> None:
        """`most` may be open at once, each for `ttl_s` seconds."""
        self._places = asyncio.Semaphore(most)
        self._ttl_s = ttl_s
        self._open: dict[Closing, asyncio.TimerHandle] = {}
        self.contained: Counter[str] = Counter()
        """How often which limit has held."""
        self._expiring: set[asyncio.Task[None]] = set()

    async def admit[Session: Opened](
        self, spec: SandboxSpec, make: Callable[[SandboxSpec], Awaitable[Session]]
    ) -> Session:
        """What `make` opens, with its files, in a place of its own until `leave`.

        It is closed when its time is over. Raises SandboxError for files that cannot be written, and as
        `make`.
        """
        session = await self._placed(spec, make)
        try:
            for path, content in spec.files.items():
                await session.put(path, content)
        except BaseException as error:
            await session.close()
            if isinstance(error, OSError):
                raise SandboxError(f"a file of sandbox {spec.name} cannot be written: {error}") from error
            raise
        return session

    async def _placed[Session: Opened](
        self, spec: SandboxSpec, make: Callable[[SandboxSpec], Awaitable[Session]]
    ) -> Session:
        await self._places.acquire()
        try:
            session = await make(spec)
        except BaseException:
            self._places.release()
            raise

        def end() -> None:
            self.contained["expired"] += 1
            session.why_closed(f"has been open for environment.sandbox.ttl_s={self._ttl_s:g} seconds")
            task = asyncio.ensure_future(session.close())
            self._expiring.add(task)
            task.add_done_callback(self._expiring.discard)

        self._open[session] = asyncio.get_running_loop().call_later(self._ttl_s, end)
        return session

    def leave(self, session: Closing) -> None:
        """It is closed. Twice is as once."""
        if timer := self._open.pop(session, None):
            timer.cancel()
            self._places.release()

    def count(self, finished: Finished, is_full: bool) -> Finished:
        """Take note of how a command has ended; returns it."""
        if finished.ending is not Ending.EXITED:
            self.contained[finished.ending.value] += 1
        if is_full:
            self.contained["disk"] += 1
        return finished

    async def close(self) -> None:
        """Close all that are open."""
        await asyncio.gather(*(session.close() for session in list(self._open)))
