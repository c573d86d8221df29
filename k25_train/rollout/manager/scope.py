"""One rollout that lives, as its code and its manager see it: name, phase, deadline, sub-rollouts.

    run(work) ─► Scope ─► phase("generate") … phase("tool") … phase("judge")
                   └────► child("critic", …): its own phase; ends no later than its parent, and with it

A scope costs some 400 bytes: 100,000 of them live at once. It has no timer and no task of its own: the work
is run by the task that called the manager, and one sweep looks at all deadlines (`wheel.py`).
"""

import asyncio
from collections.abc import Awaitable, Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any, Protocol

from k25_train.errors import RolloutError
from k25_train.rollout.manager.ledger import Ledger
from k25_train.rollout.manager.wheel import NOWHERE

STARTED, TEARDOWN = "started", "teardown"
"""Phases that the manager enters itself."""


class RolloutTimeoutError(RolloutError):
    """A rollout took longer than it may; the message names task, phase and what it was doing."""


class Host(Protocol):
    """What a scope needs of its manager."""

    ledger: Ledger
    """Counts of the event loop."""

    def now(self) -> float:
        """Seconds of the event loop's clock."""

    def moved(self, scope: "Scope") -> None:
        """A scope has another deadline."""

    def told(self, scope: "Scope", kind: str, why: str) -> None:
        """Something failed in a scope, and is tried again."""

    async def teardown(self, scope: "Scope", closing: Awaitable[None], what: str) -> None:
        """Close something within its time."""

    async def child[T](self, parent: "Scope", name: str, work: "Callable[[Scope], Awaitable[T]]") -> T:
        """Run a sub-rollout."""


_current: "ContextVar[Scope | None]" = ContextVar("scope", default=None)


def trouble(kind: str, why: str) -> None:
    """As `Scope.trouble`, of the rollout that the caller runs in; for code that may run outside of any."""
    if (scope := _current.get()) is not None:
        scope.trouble(kind, why)


def count(kind: str, number: int = 1) -> None:
    """As `Scope.count`, of the rollout that the caller runs in, if it runs in any."""
    if (scope := _current.get()) is not None:
        scope.count(kind, number)


@contextmanager
def running_in(scope: "Scope") -> Iterator[None]:
    """Within: the caller runs in a scope."""
    token = _current.set(scope)
    try:
        yield
    finally:
        _current.reset(token)


class Scope:
    """One rollout, or sub-rollout, while it lives."""

    __slots__ = (
        "__weakref__", "_host", "began", "bucket", "children", "deadline", "detail", "failed_in",
        "is_expired", "last_trouble", "name", "order", "parent", "phase_name", "progressed", "since",
        "source", "task", "was_named",
    )  # fmt: skip

    def __init__(
        self,
        host: Host,
        *,
        name: str,
        source: str,
        order: int,
        deadline: float,
        parent: "Scope | None" = None,
    ) -> None:
        """`deadline`: on the event loop's clock."""
        self._host = host
        self.name = name
        """For messages: what identifies it, such as the task's key and the sample's number."""
        self.source = source
        """Source of its task."""
        self.order = order
        """Lower ones were to go first: the number of its group."""
        self.parent = parent
        """Whose sub-rollout it is; None for a rollout."""
        self.began = self.since = self.progressed = host.now()
        self.deadline = deadline
        """Time of the event loop's clock at which it is cancelled."""
        self.phase_name = STARTED
        """What it is in: `generate`, `tool`, `judge`, …"""
        self.detail = ""
        """What exactly, and on what it waits."""
        self.task: asyncio.Task[Any] | None = None
        """That runs it."""
        self.bucket = NOWHERE
        """Of the manager's wheel."""
        self.is_expired = self.was_named = False
        self.children: dict[Scope, None] | None = None
        """Sub-rollouts that live."""
        self.last_trouble = ""
        """What failed last, and was tried again; empty for nothing."""
        self.failed_in = ""
        """Phase, with its detail, that was left by what is being raised; empty for none."""

    @property
    def who(self) -> str:
        """Name and source, for messages."""
        return f"{self.name} (source {self.source})"

    @property
    def where(self) -> str:
        """Phase and detail, for messages."""
        return f"{self.phase_name} ({self.detail})" if self.detail else self.phase_name

    def over(self) -> str:
        """What its end by its deadline is told with."""
        seconds = self.deadline - self.began
        return (
            f"{self.who}: its time is over after {seconds:g} s (from rollout.manager.rollout_timeout_s), in "
            f"phase {self.failed_in or self.where}"
        )

    def phase(self, name: str, detail: str = "") -> "Phase":
        """`with scope.phase("generate", "engine http://…"):` in a phase, and then back in the one before.

        Entering and leaving are progress. `detail` says on what it waits: what a stuck rollout is named with.
        """
        return Phase(self, name, detail)

    def progress(self, detail: str | None = None) -> None:
        """Something has moved: a token, a line, an answer. For long phases; with what it does now."""
        now = self._host.now()
        scope: Scope | None = self
        while scope is not None:
            scope.progressed, scope.was_named = now, False
            scope = scope.parent
        if detail is not None:
            self.detail = detail

    def count(self, kind: str, number: int = 1) -> None:
        """Something happened, such as `turns` or `tokens`."""
        self._host.ledger.events[kind] += number

    def trouble(self, kind: str, why: str) -> None:
        """Something failed and is tried again: counted by kind, and told in the log with task and phase."""
        self._host.told(self, kind, why)

    def limit(self, seconds: float) -> None:
        """End no later than so many seconds from now, nor later than its parent; replaces what held."""
        deadline = self._host.now() + seconds
        self.deadline = deadline if self.parent is None else min(deadline, self.parent.deadline)
        self._host.moved(self)

    async def child[T](self, name: str, work: "Callable[[Scope], Awaitable[T]]") -> T:
        """Run a sub-rollout: it ends with this scope at the latest, and shares its place among the live.

        Several at once: `asyncio.gather(scope.child(…), scope.child(…))`.
        """
        return await self._host.child(self, name, work)

    async def teardown(self, closing: Awaitable[None], what: str) -> None:
        """Close `what`, cancelled or not, within `manager.teardown_timeout_s`; what hangs is left behind, and
        named. What closing raises is told, and not raised: the response is there by then."""
        await self._host.teardown(self, closing, what)

    def leave(self) -> None:
        """Be in no phase any more."""
        ledger = self._host.ledger
        ledger.phase_seconds[self.phase_name] += self._host.now() - self.since
        ledger.phases[self.phase_name] -= 1

    def enter(self, name: str, detail: str) -> None:
        """Be in a phase from now on: seconds of the one before are counted, and it is progress."""
        now, ledger = self._host.now(), self._host.ledger
        if self.parent is None:
            ledger.phase_seconds[self.phase_name] += now - self.since
            ledger.phases[self.phase_name] -= 1
            ledger.phases[name] += 1
        self.phase_name, self.detail, self.since = name, detail, now
        scope: Scope | None = self
        while scope is not None:
            scope.progressed, scope.was_named = now, False
            scope = scope.parent


class Phase:
    """A phase while it lasts (`Scope.phase`)."""

    __slots__ = ("_before", "_detail", "_name", "_scope")

    def __init__(self, scope: Scope, name: str, detail: str) -> None:
        self._scope = scope
        self._name = name
        self._detail = detail
        self._before = ("", "")

    def __enter__(self) -> None:
        scope = self._scope
        self._before = (scope.phase_name, scope.detail)
        # A teardown follows what failed, and is not where it did.
        if self._name != TEARDOWN:
            scope.failed_in = ""
        scope.enter(self._name, self._detail)

    def __exit__(self, kind: type[BaseException] | None, *_raised: object) -> None:
        scope = self._scope
        # The innermost phase is where it happened.
        if kind is not None and not scope.failed_in:
            scope.failed_in = scope.where
        scope.enter(*self._before)
