"""What is due: deadlines that have passed, rollouts without progress, engines with old weights. Pure."""

import math
from collections.abc import Mapping
from dataclasses import dataclass

from k25_train.rollout.manager.diagnosis import engine_words, stale, stuck
from k25_train.rollout.manager.scope import Scope
from k25_train.rollout.manager.snapshot import EngineUse


@dataclass(frozen=True, slots=True)
class Look:
    """What came of looking at a scope."""

    due: float
    """When to look again."""
    cancel: bool = False
    """Whether its time is over."""
    notice: str = ""
    """What there is to tell; empty for nothing."""


def look_at(
    scope: Scope, now: float, stuck_s: float, grace_s: float, engines: Mapping[str, EngineUse]
) -> Look:
    """What is due for a scope.

    Args:
        scope: to look at.
        now: on the clock of its times.
        stuck_s: seconds without progress after which it is named, once until it moves.
        grace_s: seconds after which one that was cancelled, and did not end, is cancelled again.
        engines: how engines are.
    """
    if now >= scope.deadline:
        late_s = now - scope.deadline
        text = (
            f"{scope.who}: cancelled {late_s:.1f} s ago by its deadline, but goes on in phase {scope.where}"
        )
        return Look(now + grace_s, cancel=True, notice=text if scope.is_expired else "")
    silent_s = now - scope.progressed
    # What waits for its sub-rollouts is as silent as they are, and they are named.
    if silent_s < stuck_s or scope.children or scope.was_named:
        later = scope.progressed if silent_s < stuck_s else now
        return Look(min(later + stuck_s, scope.deadline))
    text = stuck(
        scope.who, scope.phase_name, scope.detail, silent_s, scope.last_trouble, engine_words(engines)
    )
    return Look(min(now + stuck_s, scope.deadline), notice=text)


class StaleWatch:
    """Engines whose weights are not those that are due, for too long."""

    def __init__(self, stuck_s: float) -> None:
        """A push takes its time: an engine counts once it has been behind for `stuck_s`."""
        self._stuck_s = stuck_s
        self._since: dict[str, float] = {}

    def look(self, engines: Mapping[str, EngineUse], due: int, now: float) -> list[str]:
        """What there is to tell, once for each time that an engine falls behind.

        Args:
            engines: by name.
            due: version that all others have; -1 before there is one.
            now: seconds.
        """
        behind = {name: use for name, use in engines.items() if not use.fenced and use.version != due >= 0}
        self._since = {name: self._since.get(name, now) for name in behind}
        found = []
        for name, use in behind.items():
            if (lasted_s := now - self._since[name]) >= self._stuck_s:
                found.append(stale(name, use.version, due, lasted_s))
                # Not again before it was right in between.
                self._since[name] = math.inf
        return found
