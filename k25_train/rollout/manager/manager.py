"""Runs rollouts on one event loop: admits them, gives them deadlines, names those that are stuck.

    run(name, source, order, work)
      │ queued    until `gate.py` admits it: least served source, oldest group, cap, sandboxes
      ▼
    work(scope)   in the caller's own task: scope.phase, scope.child, scope.teardown
      │
      ▼ ended     what it returned or raised; sub-rollouts are cancelled, and get `teardown_timeout_s`

    every tick    wheel ─► deadlines (cancel), silence (name)        engines ─► cap, stale weights

Shards have one each. What it decides is in modules without asyncio."""

import asyncio
import itertools
import time
from collections.abc import Awaitable, Callable
from typing import Any

from k25_train.config.rollout_manager import ManagerConfig
from k25_train.errors import K25Error
from k25_train.rollout.manager.admission import CapRule
from k25_train.rollout.manager.closings import Closings
from k25_train.rollout.manager.engines_seen import Engines
from k25_train.rollout.manager.gate import Gate
from k25_train.rollout.manager.lag import LagMeter
from k25_train.rollout.manager.ledger import Ledger
from k25_train.rollout.manager.notices import Notices
from k25_train.rollout.manager.scope import STARTED, TEARDOWN, RolloutTimeoutError, Scope, running_in
from k25_train.rollout.manager.snapshot import NUM_SLOWEST, Snapshot
from k25_train.rollout.manager.watch import Watch, slow

SLACK = 2.0
"""A rollout may take so many times what its attempts may, for its judges and teardowns. Our choice."""


class RolloutManager:
    """Rollouts of one event loop, that which first calls `run`."""

    def __init__(
        self,
        config: ManagerConfig,
        *,
        engines: Engines,
        notice: Callable[[str], None],
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """
        Args:
            config: its limits; `max_live` and `max_sandboxes` are this manager's own share.
            engines: what the rollouts generate with.
            notice: is given lines for the log.
            clock: seconds; another one in tests.
        """
        self._config, self._clock = config, clock
        self.ledger = Ledger()
        """What is counted."""
        rule = CapRule(low=config.kv_low, high=config.kv_high, most=config.max_live)
        self._gate = Gate(rule, config.max_sandboxes, clock)
        self._notices = Notices(notice, config.stuck_s)
        self._live: dict[Scope, None] = {}
        # Attempts have limits of their own; this one is for what does not keep to them.
        self._longest_s = SLACK * config.rollout_timeout_s * (config.max_restarts + 1)
        self._watch = Watch(config, engines, self.ledger, self._notices, clock)
        self._lag = LagMeter()
        self._began = clock()
        self._background: list[asyncio.Task[None]] = []
        self._closings = Closings(config.teardown_timeout_s)

    def now(self) -> float:
        """Seconds of the clock that deadlines are on."""
        return self._clock()

    def count(self, kind: str, number: int = 1) -> None:
        """Something happened, such as `restarted`; snapshots have it."""
        self.ledger.events[kind] += number

    # Rollouts

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
            name: identifies it in messages.
            work: makes it, in the task that calls this.
            source: between sources it is fair.
            order: lower goes first: the number of its group.
            needs_sandbox: whether it counts against `max_sandboxes` while it lives.

        Raises `RolloutTimeoutError` when its time is over, `RolloutError` of a manager that was closed.
        """
        if not self._background:
            watchers = (
                self._every_tick(self.sweep),
                self._every_tick(self.ask_engines),
                self._lag.run(),
            )
            self._background = [asyncio.create_task(each, name="rollout manager") for each in watchers]
        await self._gate.enter(f"{name} (source {source})", source, order, needs_sandbox)
        scope = Scope(
            self,
            name=name,
            source=source,
            order=order,
            deadline=self._clock() + self._longest_s,
        )
        self._live[scope] = None
        self.ledger.phases[STARTED] += 1
        try:
            return await self._lived(scope, work)
        finally:
            del self._live[scope]
            scope.leave()
            self._gate.leave(needs_sandbox)

    async def child[T](self, parent: Scope, name: str, work: Callable[[Scope], Awaitable[T]]) -> T:
        """As `Scope.child`."""
        scope = Scope(
            self,
            name=f"{parent.name} > {name}",
            source=parent.source,
            order=parent.order,
            deadline=parent.deadline,
            parent=parent,
        )
        if parent.children is None:
            parent.children = {}
        parent.children[scope] = None
        try:
            return await self._lived(scope, work)
        finally:
            parent.children.pop(scope, None)
            parent.progress()

    async def _lived[T](self, scope: Scope, work: Callable[[Scope], Awaitable[T]]) -> T:
        """What a scope's work returns or raises; its deadline holds, and its sub-rollouts end with it."""
        task = scope.task = asyncio.current_task()
        assert task is not None
        self.moved(scope)
        try:
            with running_in(scope):
                return await work(scope)
        except asyncio.CancelledError:
            # Whoever else has cancelled it gets what is due to them; a parent's deadline is the parent's.
            if not scope.is_expired or task.uncancel():
                raise
            self.ledger.failures["deadline"] += 1
            error = RolloutTimeoutError(scope.over())
            self._notices.say("deadline", str(error), self._clock())
            raise error from None
        except K25Error as error:
            self._failed(scope, error)
            raise
        finally:
            self._watch.drop(scope)
            if scope.children:
                await self._end([child.task for child in scope.children if child.task not in (None, task)])
            scope.task = None

    def _failed(self, scope: Scope, error: K25Error) -> None:
        kind = type(error).__name__.removesuffix("Error").lower()
        if not (isinstance(error, RolloutTimeoutError) or scope.parent):
            self.ledger.failures[kind] += 1
            text = f"{scope.who}: failed in phase {scope.failed_in or scope.where}: {error}"
            self._notices.say(f"failed {kind}", text, self._clock())

    async def _end(self, tasks: "list[asyncio.Task[Any] | None]") -> None:
        """Cancel sub-rollouts, and wait for their end as long as a teardown may take."""
        running = {task for task in tasks if task is not None}
        for task in running:
            task.cancel()
        if running:
            await asyncio.wait(running, timeout=self._config.teardown_timeout_s)

    # What scopes ask for

    def moved(self, scope: Scope) -> None:
        """As `Host.moved`."""
        self._watch.place(scope)

    def told(self, scope: Scope, kind: str, why: str) -> None:
        """As `Host.told`."""
        self.ledger.failures[kind] += 1
        scope.last_trouble = f"{kind}: {why}"
        text = f"{scope.who}: {kind} in phase {scope.where}, tried again: {why}"
        self._notices.say(f"trouble {kind}", text, self._clock())

    async def teardown(self, scope: Scope, closing: Awaitable[None], what: str) -> None:
        """As `Host.teardown`."""
        if wrong := await self._closings.close(scope, closing, what):
            self.ledger.failures[TEARDOWN] += 1
            self._notices.say(TEARDOWN, f"{scope.who}: in phase {TEARDOWN}: {wrong}", self._clock())

    # Watching

    async def _every_tick(self, look: Callable[[], Awaitable[None]]) -> None:
        while True:
            await asyncio.sleep(self._watch.tick_s)
            try:
                await look()
            except Exception as error:
                # Deadlines and what is stuck have to be looked for whatever happens.
                text = f"rollouts are not watched for a moment: {type(error).__name__}: {error}"
                self._notices.say("watch", text, self._clock())

    async def sweep(self) -> None:
        """Look at all that is due: deadlines, silence, the queue. Called each tick."""
        await self._watch.sweep()
        now = self._clock()
        if text := self._gate.held_back(now, self._config.stuck_s):
            self._notices.say("held back", text, now)
        self._notices.tick(now)

    async def ask_engines(self) -> None:
        """See how engines are, and admit more or fewer. Called each tick."""
        self._gate.adjust(await self._watch.ask_engines(self._live))

    def snapshot(self) -> Snapshot:
        """How everything is."""
        ledger, gate, now = self.ledger, self._gate, self._clock()
        return Snapshot(
            live=gate.live,
            cap=gate.cap.value,
            cap_reason=gate.cap.reason,
            queued=gate.queued(),
            phases={phase: number for phase, number in ledger.phases.items() if number},
            phase_seconds=dict(ledger.phase_seconds),
            events={**ledger.events, "admitted": gate.admitted, "ended": gate.admitted - gate.live},
            failures=dict(ledger.failures),
            slowest=tuple(slow(scope, now) for scope in itertools.islice(self._live, NUM_SLOWEST)),
            sandboxes=gate.sandboxes,
            max_sandboxes=gate.max_sandboxes,
            closing=len(self._closings),
            engines=dict(self._watch.uses),
            lag_p50_s=self._lag.quantile(0.5),
            lag_p99_s=self._lag.quantile(0.99),
            uptime_s=now - self._began,
        )

    async def close(self) -> None:
        """Admit none, cancel all that live, and wait for their end as long as teardowns may take."""
        self._gate.close()
        await self._end([scope.task for scope in self._live])
        await self._closings.wait()
        for task in self._background:
            task.cancel()
        await asyncio.gather(*self._background, return_exceptions=True)
