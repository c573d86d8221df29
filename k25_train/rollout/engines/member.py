"""What a pool knows of one of its engines."""

from dataclasses import dataclass, field

from k25_train.rollout.engines.base import Engine
from k25_train.rollout.engines.busy_clock import UseClock


@dataclass(slots=True)
class Member:
    """One engine of a pool."""

    engine: Engine
    """What generates."""
    running: int = 0
    """Requests that it has."""
    failures: int = 0
    """Requests that failed since one succeeded, or since it was given weights."""
    fences: int = 0
    """Times that it was fenced."""
    why_fenced: str = ""
    """Why it gets none; empty if it does."""
    use: UseClock = field(default_factory=UseClock)
    """How long it generated."""

    def fence(self, why: str) -> str:
        """Have it get none; what there is to tell."""
        self.why_fenced = why
        self.fences += 1
        return f"{self.engine.name} is fenced off: {why}"
