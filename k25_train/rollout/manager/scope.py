"""Where a rollout is: its phase, since when, until when it may last, and what it has started.

    rollout ─► phase "generate" ─► phase "tool" ─► … ─► teardown, with a limit of its own
       └─ child ─► child            a cancelled or late rollout takes its children with it

A scope is a few slots, no task and no timer: 100,000 of them are swept together (`manager.py`).
"""

import asyncio
from collections.abc import Awaitable, Callable, Iterator
from contextlib import contextmanager
from typing import Protocol

from k25_train.errors import K25Error


class RolloutTimeoutError(K25Error):
    """A rollout has taken longer than it may."""


class Watch(Protocol):
    """What a scope tells; the manager is one."""

    def now(self) -> float:
        """Seconds of the event loop's clock."""

    def count(self, kind: str) -> None:
        """Something of that kind happened once more."""

    def notice(self, text: str) -> None:
        """What there is to know."""

    @property
    def teardown_timeout_s(self) -> float:
        """Seconds that a teardown may take."""


class Scope:
    """One rollout, or a child of one."""

    __slots__ = ("_task", "_watch", "cause", "children", "deadline", "is_late", "name", "order", "phase_name",
                 "progressed", "since", "source", "told_stuck")  # fmt: skip

    def __init__(self, watch: Watch, name: str, source: str, order: int, deadline: float) -> None:
        """`deadline`: on the watch's clock."""
        self._watch = watch
        self._task: asyncio.Task[object] | None = None
        self.name = name
        """Task and sample, for people."""
        self.source = source
        """Source of the task."""
        self.order = order
        """Older ones have lower ones."""
        self.deadline = deadline
        """When it has taken too long, on the watch's clock."""
        self.phase_name = "waiting"
        """What it does."""
        self.cause = "for its turn"
        """Whom it waits for."""
        self.since = self.progressed = watch.now()
        """When its phase began, and when it has last come on."""
        self.is_late = False
        """Whether it was ended for its deadline."""
        self.told_stuck = False
        """Whether the log has it as stuck in this phase."""
        self.children = 0
        """Sub-rollouts that are live."""

    @contextmanager
    def phase(self, name: str, cause: str = "") -> Iterator[None]:
        """Within: it is in this phase, waiting for `cause`."""
        before = (self.phase_name, self.cause)
        self._enter(name, cause)
        try:
            yield
        finally:
            self._enter(*before)

    def progress(self) -> None:
        """It has come on within its phase."""
        self.progressed = self._watch.now()
        self.told_stuck = False

    async def child[T](self, name: str, work: Callable[["Scope"], Awaitable[T]]) -> T:
        """Run a sub-rollout: it is cancelled with its parent, and has its deadline."""
        child = Scope(self._watch, f"{self.name} > {name}", self.source, self.order, self.deadline)
        self.children += 1
        try:
            return await work(child)
        finally:
            self.children -= 1
            self.progress()

    async def teardown(self, closing: Awaitable[None], what: str) -> None:
        """Close what a rollout holds, whatever ended it; what hangs is left behind, and named."""
        limit_s = self._watch.teardown_timeout_s
        task = asyncio.ensure_future(closing)
        with self.phase("teardown", what):
            try:
                async with asyncio.timeout(limit_s):
                    await asyncio.shield(task)
            except TimeoutError:
                self._watch.count("failed/teardown")
                self._watch.notice(
                    f"{self.name}: {what} did not close within {limit_s:g} s, and is left behind"
                )
                task.cancel()
            except asyncio.CancelledError:
                # The rollout was cancelled while it closed: closing goes on, within the same limit.
                asyncio.get_running_loop().call_later(limit_s, task.cancel)
                raise
            except Exception as error:
                self._watch.count("failed/teardown")
                self._watch.notice(f"{self.name}: {what} did not close: {type(error).__name__}: {error}")

    def begin(self, task: "asyncio.Task[object] | None") -> None:
        """It runs in a task, which its deadline cancels."""
        self._task = task
        self._enter("running", "")

    def expire(self) -> None:
        """Its time is over: cancel what it does, of which the manager makes a `RolloutTimeoutError`."""
        if self._task is not None and not self.is_late:
            self.is_late = True
            self._task.cancel()

    def _enter(self, name: str, cause: str) -> None:
        self.phase_name, self.cause = name, cause
        self.since = self.progressed = self._watch.now()
        self.told_stuck = False
