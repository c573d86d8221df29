"""Who may live now: waits in the queue until the cap and the sandboxes have room."""

import asyncio
from collections.abc import Callable, Collection
from dataclasses import dataclass

from k25_train.errors import RolloutError
from k25_train.rollout.engines.base import EngineState
from k25_train.rollout.manager.admission import Cap, CapRule
from k25_train.rollout.manager.diagnosis import held_back
from k25_train.rollout.manager.fair_queue import FairQueue


@dataclass(slots=True, eq=False)
class _Waiting:
    who: str
    turn: "asyncio.Future[None]"
    needs_sandbox: bool


class Gate:
    """Admits rollouts of one event loop."""

    def __init__(self, rule: CapRule, max_sandboxes: int, clock: Callable[[], float]) -> None:
        """`clock`: seconds."""
        self._rule, self._clock = rule, clock
        self._queue: FairQueue[_Waiting] = FairQueue()
        self._waiting: dict[_Waiting, None] = {}
        self._admitted_at = clock()
        self._is_closed = False
        self.cap: Cap = rule.first()
        """How many may live."""
        self.live = 0
        """Rollouts that were admitted, and have not left."""
        self.admitted = 0
        """All that ever were."""
        self.sandboxes = 0
        """Those that live and need a sandbox."""
        self.max_sandboxes = max_sandboxes
        """How many of them there may be."""

    async def enter(self, who: str, source: str, order: int, needs_sandbox: bool) -> None:
        """Wait until it is one's turn. Raises `RolloutError` where the gate was closed."""
        if self._is_closed:
            raise _closed(who)
        if not self._waiting and self._has_room(needs_sandbox):
            self._let_in(needs_sandbox)
            return
        entry = _Waiting(who, asyncio.get_running_loop().create_future(), needs_sandbox)
        self._queue.add(source, order, entry, needs_sandbox=needs_sandbox)
        self._waiting[entry] = None
        self._admit()
        try:
            await entry.turn
        except asyncio.CancelledError:
            # It was admitted, and cancelled before it could begin.
            if entry.turn.done() and not entry.turn.cancelled():
                self.leave(needs_sandbox)
            raise
        finally:
            self._waiting.pop(entry, None)

    def leave(self, needs_sandbox: bool) -> None:
        """One that was admitted has ended."""
        self.live -= 1
        self.sandboxes -= needs_sandbox
        self._admit()

    def adjust(self, states: Collection[EngineState]) -> None:
        """Have the cap follow what engines say."""
        self.cap = self._rule.following(self.cap, states, self.live)
        self._admit()

    def queued(self) -> dict[str, int]:
        """Source -> how many wait."""
        return self._queue.by_source()

    def held_back(self, now: float, stuck_s: float) -> str:
        """What to tell where many wait and none was admitted for `stuck_s`; empty for nothing."""
        waited_s = now - self._admitted_at
        if not self._waiting:
            self._admitted_at = now
            return ""
        if waited_s < stuck_s:
            return ""
        who = next(iter(self._waiting)).who
        sandboxes = (self.sandboxes, self.max_sandboxes)
        return held_back(who, waited_s, len(self._waiting), self.cap, self.live, sandboxes)

    def close(self) -> None:
        """Admit none any more; those that wait raise `RolloutError`."""
        self._is_closed = True
        for entry in list(self._waiting):
            if not entry.turn.done():
                entry.turn.set_exception(_closed(entry.who))

    def _has_room(self, needs_sandbox: bool) -> bool:
        return self.live < self.cap.value and self.sandboxes + needs_sandbox <= self.max_sandboxes

    def _let_in(self, needs_sandbox: bool) -> None:
        self.live += 1
        self.admitted += 1
        self.sandboxes += needs_sandbox
        self._admitted_at = self._clock()

    def _admit(self) -> None:
        while self.live < self.cap.value and not self._is_closed:
            entry = self._queue.pop(self.max_sandboxes - self.sandboxes)
            if entry is None:
                return
            if entry.turn.done():
                continue
            self._let_in(entry.needs_sandbox)
            self._waiting.pop(entry, None)
            entry.turn.set_result(None)


def _closed(who: str) -> RolloutError:
    return RolloutError(f"{who}: the rollout manager is closed, and takes no more rollouts")
