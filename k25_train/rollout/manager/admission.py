"""How many rollouts may be live: more while engines have room, fewer when they run full. Pure.

Additive increase, multiplicative decrease, as congestion control has it (Chiu and Jain, 1989); thresholds of
the cache as prime-rl's, its steps are our choice.
"""

from dataclasses import dataclass, replace

GROWS, SHRINKS = 1.25, 0.8
"""Factors of the cap after a look at the engines."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Load:
    """What engines say of themselves, the fullest of them."""

    kv_use: float
    """Share of the cache of keys and values in use, 0 to 1."""
    waiting: int
    """Requests that wait for room in it."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Cap:
    """Rollouts that may be live."""

    now: int
    """At present."""
    most: int
    """Never more than these: `rollout.manager.max_live`."""
    least: int = 1
    """Never fewer than these."""
    low: float
    """Share of the cache below which it grows."""
    high: float
    """Share above which it shrinks."""

    def after(self, load: Load, live: int) -> "Cap":
        """The cap after a look: it grows only where it is what limits."""
        if load.kv_use > self.high:
            return replace(self, now=max(self.least, int(min(self.now, max(live, 1)) * SHRINKS)))
        if load.kv_use < self.low and not load.waiting and live >= self.now:
            return replace(self, now=min(self.most, max(self.now + 1, int(self.now * GROWS))))
        return self
