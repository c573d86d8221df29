"""What is counted: rollouts by phase, seconds of phases, events, failures by cause."""

from collections import Counter, defaultdict
from dataclasses import dataclass, field


@dataclass(slots=True)
class Ledger:
    """Counts of one event loop, since it began."""

    phases: Counter[str] = field(default_factory=Counter)
    """Phase -> rollouts that are in it."""
    phase_seconds: defaultdict[str, float] = field(default_factory=lambda: defaultdict(float))
    """Phase -> seconds that rollouts spent in it, all together."""
    events: Counter[str] = field(default_factory=Counter)
    """Kind -> how often: turns, admitted, ended, restarted."""
    failures: Counter[str] = field(default_factory=Counter)
    """Cause -> how often; those that a later try made up for included."""
