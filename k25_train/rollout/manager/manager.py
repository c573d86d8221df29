"""Rollouts of one event loop: admitted, watched, ended in time.

    run(…) ─► waits: fair between sources, oldest first ─► live: cap, sandboxes ─► work(scope) ─► result
                                                             │
              one sweep a second over all of them: deadlines, who is stuck, the engines' load

`run` runs in its caller's task, so a rollout that waits is a future in a queue, and a live one is a scope.
"""

import asyncio
import time
from collections import Counter
from collections.abc import Awaitable, Callable

from k25_train.config.rollout_manager import ManagerConfig
from k25_train.rollout.manager.admission import Cap, Load
from k25_train.rollout.manager.queue import FairQueue
from k25_train.rollout.manager.scope import RolloutTimeoutError, Scope

SWEEP_S = 1.0
"""Between two sweeps. Our choice."""
MOST_TOLD = 20
"""Stuck rollouts that one sweep names; there may be thousands of one cause. Our choice."""
LoadOf = Callable[[], Awaitable[Load]]


async def no_load() -> Load:
    """Engines that are never full."""
    return Load(kv_use=0.0, waiting=0)


class _Waiting:
    """A rollout that waits to begin."""

    __slots__ = ("begins", "needs_sandbox")

    def __init__(self, needs_sandbox: bool) -> None:
        self.begins: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self.needs_sandbox = needs_sandbox


class RolloutManager:
    """See the head of this file. For one event loop."""

    def __init__(
        self,
        config: ManagerConfig,
        *,
        load: LoadOf = no_load,
        notice: Callable[[str], None] = lambda _: None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """
        Args:
            config: limits.
            load: asks the engines how full they are.
            notice: tells what there is to know.
            clock: seconds.
        """
        self.config = config
        """Limits."""
        self.notice = notice
        self.now = clock
        self._load = load
        self.cap = Cap(now=config.max_live, most=config.max_live, low=config.kv_low, high=config.kv_high)
        """Rollouts that may be live now."""
        self._queue: FairQueue[_Waiting] = FairQueue()
        self.live: set[Scope] = set()
        """Rollouts that have begun."""
        self.sandboxes = 0
        """Of those, how many need a sandbox."""
        self.counts: Counter[str] = Counter()
        """What has happened, by kind: `begun`, `done`, `failed/KIND`, …"""
        self._sweeper: asyncio.Task[None] | None = None

    @property
    def waiting(self) -> int:
        """Rollouts that wait to begin."""
        return len(self._queue)

    @property
    def teardown_timeout_s(self) -> float:
        """See `Watch`."""
        return self.config.teardown_timeout_s

    def count(self, kind: str) -> None:
        """See `Watch`."""
        self.counts[kind] += 1

    async def run[T](
        self,
        name: str,
        work: Callable[[Scope], Awaitable[T]],
        *,
        source: str,
        order: int,
        needs_sandbox: bool = False,
    ) -> T:
        """Run a rollout once it is its turn; returns or raises what it does.

        Args:
            name: task and sample, for people.
            work: does it.
            source: of the task: between sources it is fair.
            order: lower ones go first.
            needs_sandbox: whether it takes one of `max_sandboxes`.

        Raises `RolloutTimeoutError` for one that has taken longer than `rollout_timeout_s`.
        """
        if self._sweeper is None:
            self._sweeper = asyncio.get_running_loop().create_task(self._sweep_on())
        await self._turn_of(source, order, needs_sandbox)
        scope = Scope(self, name, source, order, self.now() + self.config.rollout_timeout_s)
        scope.begin(asyncio.current_task())
        self.live.add(scope)
        self.counts["begun"] += 1
        try:
            result = await work(scope)
        except asyncio.CancelledError:
            task = asyncio.current_task()
            if not scope.is_late or task is None or task.uncancel() > 0:
                self.counts["cancelled"] += 1
                raise
            self.counts["failed/timeout"] += 1
            raise RolloutTimeoutError(
                f"{name}: not done within {self.config.rollout_timeout_s:g} s "
                f"(rollout.manager.rollout_timeout_s); in phase {scope.phase_name}"
            ) from None
        except Exception as error:
            self.counts[f"failed/{type(error).__name__}"] += 1
            raise
        else:
            self.counts["done"] += 1
            return result
        finally:
            self.live.discard(scope)
            self.sandboxes -= needs_sandbox
            self._admit()

    async def close(self) -> None:
        """End the sweep; rollouts are their callers'."""
        if self._sweeper is not None:
            self._sweeper.cancel()
            await asyncio.gather(self._sweeper, return_exceptions=True)
            self._sweeper = None

    def sweep(self) -> None:
        """End rollouts whose time is over, and name those that are stuck."""
        now, told = self.now(), 0
        for scope in tuple(self.live):
            if now > scope.deadline:
                scope.expire()
            elif now - scope.progressed > self.config.stuck_s and not scope.told_stuck:
                scope.told_stuck = True
                self.counts[f"stuck/{scope.phase_name}"] += 1
                told += 1
                if told <= MOST_TOLD:
                    waits = f" {scope.cause}" if scope.cause else ""
                    self.notice(
                        f"{scope.name}: stuck in phase {scope.phase_name}{waits} for "
                        f"{now - scope.progressed:.0f} s (rollout.manager.stuck_s)"
                    )
        if told > MOST_TOLD:
            self.notice(f"{told - MOST_TOLD:,} more rollouts are stuck")

    async def look_at_engines(self) -> None:
        """Bring the cap to what the engines say."""
        self.cap = self.cap.after(await self._load(), len(self.live))
        self._admit()

    async def _sweep_on(self) -> None:
        while True:
            await asyncio.sleep(SWEEP_S)
            self.sweep()
            try:
                await self.look_at_engines()
            except Exception as error:
                # Engines that cannot be asked limit nothing: requests to them are what finds it out.
                self.counts[f"failed/load/{type(error).__name__}"] += 1

    async def _turn_of(self, source: str, order: int, needs_sandbox: bool) -> None:
        waiting = _Waiting(needs_sandbox)
        if not self._queue and self._may(waiting):
            self.sandboxes += needs_sandbox
            self._admitted += 1
        else:
            self._queue.push(waiting, source, order)
            try:
                await waiting.begins
            except asyncio.CancelledError:
                if waiting.begins.done() and not waiting.begins.cancelled():
                    # It was its turn already: somebody else's now.
                    self._admitted -= 1
                    self.sandboxes -= needs_sandbox
                    self._admit()
                raise
        self._admitted -= 1

    _admitted = 0
    """Rollouts whose turn it is, and that are not live yet."""

    def _may(self, waiting: _Waiting) -> bool:
        has_sandbox = not waiting.needs_sandbox or self.sandboxes < self.config.max_sandboxes
        return waiting.begins.cancelled() or (has_sandbox and len(self.live) + self._admitted < self.cap.now)

    def _admit(self) -> None:
        while (waiting := self._queue.pop(self._may)) is not None:
            if not waiting.begins.done():
                self.sandboxes += waiting.needs_sandbox
                self._admitted += 1
                waiting.begins.set_result(None)
