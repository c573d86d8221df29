"""How many rollouts may live: additive increase, multiplicative decrease on the engines' keys and values.

    use of keys and values      engines' queues     cap
    ≥ kv_high                   requests wait       down to 9/10 of what lives: prefixes are being evicted
    < kv_low                    empty               up, if it is what holds rollouts back
    between                                         as it is

A full cache without a queue is what one wants. Those that live stay: a lower cap only admits none until
enough have ended. AIMD is how TCP finds the room that many share without knowing it (Chiu and Jain 1989);
limits and rates are our choice.
"""

from collections.abc import Collection
from dataclasses import dataclass

from k25_train.rollout.engines.base import EngineState

DECREASE = 0.9
"""Share of the live rollouts that the cap falls to."""
INCREASE = 0.05
"""Share of the cap that it rises by, at least 1: additive on the scale of what fits."""
BINDING = 0.95
"""Share of the cap from which on it counts as what holds rollouts back."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Cap:
    """How many rollouts may live now."""

    value: int
    """Rollouts, at least 1."""
    reason: str
    """What set it, for people."""


@dataclass(frozen=True, slots=True, kw_only=True)
class CapRule:
    """What a cap depends on."""

    low: float
    """Use of keys and values below which it rises."""
    high: float
    """Use from which on it falls."""
    most: int
    """Never above."""

    def first(self) -> Cap:
        """Before anything is known of the engines: all that there may be."""
        return Cap(value=self.most, reason="max_live")

    def following(self, cap: Cap, states: Collection[EngineState], live: int) -> Cap:
        """The cap behind this one.

        Args:
            cap: the one that holds.
            states: of the engines that serve; none says nothing, and changes nothing.
            live: rollouts that live.
        """
        if not states:
            return cap
        # Requests are spread by what engines have to do, so that one that is full stands for all.
        use = max(state.kv_use for state in states)
        waiting = sum(state.waiting for state in states)
        running = sum(state.running for state in states)
        if use >= self.high and waiting:
            # Not below what the engines run already: they would idle.
            value = max(min(int(live * DECREASE), cap.value), running, 1)
            if value < cap.value:
                reason = f"kv_use {use:.2f} >= {self.high:g} with {waiting:,} requests waiting"
                return Cap(value=value, reason=reason)
            return cap
        if use < self.low and not waiting and live >= cap.value * BINDING:
            value = min(cap.value + max(int(cap.value * INCREASE), 1), self.most)
            reason = "max_live" if value == self.most else f"kv_use {use:.2f} < {self.low:g}"
            return Cap(value=value, reason=reason)
        return cap
