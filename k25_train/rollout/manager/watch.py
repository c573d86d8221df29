"""Looks at all rollouts and engines, tick by tick: the manager's eyes.

wheel ─► scopes that are due ─► deadline over: cancel        silent for stuck_s: name it
engines ─► states ─► those with old weights: name them        (the caller has the cap follow them)
"""

import asyncio
import itertools
from collections.abc import Callable, Collection, Iterable
from contextlib import suppress

from k25_train.config.rollout_manager import ManagerConfig
from k25_train.rollout.engines.base import EngineError, EngineState
from k25_train.rollout.manager.diagnosis import GENERATE
from k25_train.rollout.manager.engines_seen import Engines, engine_uses
from k25_train.rollout.manager.ledger import Ledger
from k25_train.rollout.manager.notices import Notices
from k25_train.rollout.manager.scope import Scope
from k25_train.rollout.manager.snapshot import EngineUse, Slow
from k25_train.rollout.manager.sweep import StaleWatch, look_at
from k25_train.rollout.manager.wheel import Wheel

TICKS = 8
"""Ticks in `stuck_s`: how exactly it is kept."""
LONGEST_TICK_S = 1.0
"""Longest time between two looks at deadlines and engines."""
AT_ONCE = 1000
"""Scopes that are looked at between two turns of the event loop."""
NUM_EXAMPLES = 3
"""Rollouts that are named where many are concerned."""


class Watch:
    """Of one manager."""

    def __init__(
        self,
        config: ManagerConfig,
        engines: Engines,
        ledger: Ledger,
        notices: Notices,
        clock: Callable[[], float],
    ) -> None:
        self._config, self._engines, self._clock = config, engines, clock
        self._ledger, self._notices = ledger, notices
        self._wheel: Wheel[Scope] = Wheel(min(config.stuck_s / TICKS, LONGEST_TICK_S))
        self._stale = StaleWatch(config.stuck_s)
        self.uses: dict[str, EngineUse] = {}
        """Engines as they were seen last."""

    @property
    def tick_s(self) -> float:
        """Seconds between two sweeps."""
        return self._wheel.tick_s

    def place(self, scope: Scope) -> None:
        """Look at a scope when it is due: its deadline, or silence."""
        self._wheel.remove(scope, scope.bucket)
        due = min(scope.deadline, scope.progressed + self._config.stuck_s)
        scope.bucket = self._wheel.put(scope, due)

    def drop(self, scope: Scope) -> None:
        """It has ended."""
        self._wheel.remove(scope, scope.bucket)

    async def sweep(self) -> None:
        """Look at all scopes that are due."""
        for number, scope in enumerate(self._wheel.due(self._clock())):
            if number % AT_ONCE == AT_ONCE - 1:
                await asyncio.sleep(0)
            # It may have ended while others were looked at.
            if scope.task is not None:
                self._look_at(scope)

    def _look_at(self, scope: Scope) -> None:
        config, now = self._config, self._clock()
        look = look_at(scope, now, config.stuck_s, config.teardown_timeout_s, self.uses)
        if look.notice:
            self._ledger.failures["stuck"] += 1
            self._notices.say(f"stuck {scope.phase_name}", look.notice, now)
        if look.cancel and scope.task is not None:
            scope.is_expired = True
            scope.task.cancel()
        scope.was_named = scope.was_named or bool(look.notice)
        scope.bucket = self._wheel.put(scope, look.due)

    async def ask_engines(self, live: Iterable[Scope]) -> Collection[EngineState]:
        """How serving engines are. `live`: rollouts, of which some are named where weights are stale."""
        states: dict[str, EngineState] = {}
        # Without engines, each rollout that needs one says so.
        with suppress(EngineError):
            states = await self._engines.states()
        self.uses = engine_uses(states, self._engines.fenced())
        now = self._clock()
        behind = self._stale.look(self.uses, self._engines.version, now)
        if behind:
            waiting = (scope.who for scope in itertools.islice(live, AT_ONCE) if scope.phase_name == GENERATE)
            words = ", ".join(itertools.islice(waiting, NUM_EXAMPLES)) or "no rollout"
            for text in behind:
                self._ledger.failures["stale_weights"] += 1
                self._notices.say("stale weights", f"{text}; in phase {GENERATE} now: {words}", now)
        return states.values()


def slow(scope: Scope, now: float) -> Slow:
    """A rollout as a snapshot has it."""
    return Slow(
        name=scope.name,
        source=scope.source,
        phase=scope.phase_name,
        detail=scope.detail,
        phase_s=now - scope.since,
        total_s=now - scope.began,
    )
