"""An event loop in a thread of its own: engines answer while the main thread trains."""

import asyncio
import threading
from collections.abc import Coroutine
from concurrent.futures import Future
from typing import Any

from k25_train.rollout.manager.loops import new_loop

CLOSING_S = 10.0
"""Longest time that what still runs gets to end."""


class EventLoop:
    """Runs coroutines; `submit` and `wait` may be called from any other thread."""

    def __init__(self) -> None:
        self._loop = new_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, name="rollouts", daemon=True)
        self._thread.start()

    def submit[T](self, call: Coroutine[Any, Any, T]) -> Future[T]:
        """Start it; its result is there when it is."""
        return asyncio.run_coroutine_threadsafe(call, self._loop)

    def wait[T](self, call: Coroutine[Any, Any, T]) -> T:
        """Return or raise what it does; a wait that is interrupted cancels it."""
        future = self.submit(call)
        try:
            return future.result()
        except BaseException:
            future.cancel()
            raise

    def close(self) -> None:
        """Cancel what still runs, and end the thread. Twice is as once."""
        if self._loop.is_closed():
            return

        async def end() -> None:
            others = asyncio.all_tasks() - {asyncio.current_task()}
            for task in others:
                task.cancel()
            await asyncio.wait(others, timeout=CLOSING_S) if others else None

        self.wait(end())
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join()
        self._loop.close()
