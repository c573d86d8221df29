"""How many sandboxes are open, for how long, and what their limits have held: the same for every kind."""

import asyncio
from collections import Counter
from collections.abc import Awaitable, Callable
from typing import Protocol

from k25_train.environments.sandboxes.base import Ending, Finished


class Closing(Protocol):
    """What is open."""

    async def close(self) -> None:
        """End it."""


class Room:
    """Places for sandboxes. Whoever has waited longest gets the next."""

    def __init__(self, most: int) -> None:
        """`most` may be open at once."""
        self._places = asyncio.Semaphore(most)
        self._open: dict[Closing, asyncio.TimerHandle] = {}
        self.contained: Counter[str] = Counter()
        """How often which limit has held."""
        self._expiring: set[asyncio.Task[None]] = set()

    async def admit[Session: Closing](
        self, make: Callable[[], Awaitable[Session]], ttl_s: float, expire: Callable[[Session], None]
    ) -> Session:
        """What `make` opens, in a place of its own until `leave`.

        After `ttl_s` seconds `expire` is called with it, and it is closed.
        """
        await self._places.acquire()
        try:
            session = await make()
        except BaseException:
            self._places.release()
            raise

        def end() -> None:
            self.contained["expired"] += 1
            expire(session)
            task = asyncio.ensure_future(session.close())
            self._expiring.add(task)
            task.add_done_callback(self._expiring.discard)

        self._open[session] = asyncio.get_running_loop().call_later(ttl_s, end)
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
