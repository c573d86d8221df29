"""Time limits of requests that are stopped while their engine is paused."""

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager


class PausableLimits:
    """Time limits of one engine's requests: a pause of minutes, in which a trainer trains, fails none."""

    def __init__(self) -> None:
        self._left: dict[asyncio.Timeout, float] = {}
        self._is_paused = False

    @asynccontextmanager
    async def within(self, seconds: float) -> AsyncIterator[None]:
        """Run the block; raises TimeoutError when it has run for so many seconds, pauses not counted."""
        async with asyncio.timeout(None) as limit:
            self._left[limit] = seconds
            if not self._is_paused:
                limit.reschedule(_now() + seconds)
            try:
                yield
            finally:
                del self._left[limit]

    def pause(self) -> None:
        """Stop the clocks; twice is as once."""
        if self._is_paused:
            return
        self._is_paused = True
        for limit in self._left:
            when = limit.when()
            if when is not None:
                self._left[limit] = when - _now()
                limit.reschedule(None)

    def resume(self) -> None:
        """Let them go on; twice is as once."""
        if not self._is_paused:
            return
        self._is_paused = False
        for limit, seconds in self._left.items():
            limit.reschedule(_now() + seconds)

    def expire(self) -> None:
        """End all of them now."""
        for limit in self._left:
            limit.reschedule(_now())


def _now() -> float:
    return asyncio.get_running_loop().time()
