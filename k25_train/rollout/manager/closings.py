"""Teardowns: each has its time, also where its rollout was cancelled; what hangs is left behind by name."""

import asyncio
from collections.abc import Awaitable

from k25_train.rollout.manager.scope import TEARDOWN, Scope


class Closings:
    """Those of one manager."""

    def __init__(self, limit_s: float) -> None:
        """`limit_s`: seconds of each (rollout.manager.teardown_timeout_s)."""
        self._limit_s = limit_s
        self._running: set[asyncio.Future[None]] = set()

    def __len__(self) -> int:
        return len(self._running)

    async def close(self, scope: Scope, closing: Awaitable[None], what: str) -> str:
        """Close `what`, in a task of its own, which goes on if the caller is cancelled meanwhile.

        Returns what is to be told: that it hangs, or what it raised; empty if it closed.
        """
        task = asyncio.ensure_future(closing)
        self._running.add(task)
        task.add_done_callback(self._running.discard)
        try:
            with scope.phase(TEARDOWN, what):
                await asyncio.wait({task}, timeout=self._limit_s)
        except asyncio.CancelledError:
            asyncio.get_running_loop().call_later(self._limit_s, task.cancel)
            raise
        if not task.done():
            task.cancel()
            return (
                f"{what} did not close within {self._limit_s:g} s (rollout.manager.teardown_timeout_s), and "
                "is left behind"
            )
        error = None if task.cancelled() else task.exception()
        return f"{what} did not close: {type(error).__name__}: {error}" if error else ""

    async def wait(self) -> None:
        """Wait for those that still run, as long as each may take."""
        if self._running:
            await asyncio.wait(set(self._running), timeout=self._limit_s)
