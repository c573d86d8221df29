"""How a manager's rollouts are, as numbers and texts: for status pages, metrics, and between shards."""

import dataclasses
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

NUM_SLOWEST = 20
"""Rollouts that are listed."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Slow:
    """A rollout that lives for long."""

    name: str
    """Which."""
    source: str
    """Source of its task."""
    phase: str
    """What it is in."""
    detail: str
    """What exactly."""
    phase_s: float
    """Seconds in that phase."""
    total_s: float
    """Seconds since it was admitted."""


@dataclass(frozen=True, slots=True, kw_only=True)
class EngineUse:
    """An engine."""

    version: int
    """Of its weights."""
    running: int
    """Responses that it generates."""
    waiting: int
    """Requests that wait in it."""
    kv_use: float
    """Share of its keys and values in use."""
    busy_share: float
    """Share of the time that it generates."""
    fenced: str = ""
    """Why it gets no requests; empty if it does."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Snapshot:
    """The rollouts of one event loop, or of several together."""

    live: int = 0
    """Rollouts that live."""
    cap: int = 0
    """How many may."""
    cap_reason: str = ""
    """What set it."""
    queued: Mapping[str, int] = field(default_factory=dict)
    """Source -> rollouts that wait to be admitted."""
    phases: Mapping[str, int] = field(default_factory=dict)
    """Phase -> rollouts that are in it."""
    phase_seconds: Mapping[str, float] = field(default_factory=dict)
    """Phase -> seconds spent in it by all rollouts together, since the beginning."""
    events: Mapping[str, int] = field(default_factory=dict)
    """Kind -> how often since the beginning: turns, tokens, admitted, ended, …"""
    failures: Mapping[str, int] = field(default_factory=dict)
    """Cause -> how often since the beginning."""
    slowest: Sequence[Slow] = ()
    """Those that live longest, the oldest first."""
    sandboxes: int = 0
    """Rollouts with a sandbox."""
    max_sandboxes: int = 0
    """How many may have one."""
    closing: int = 0
    """Teardowns that go on."""
    engines: Mapping[str, EngineUse] = field(default_factory=dict)
    """Name -> engine."""
    lag_p50_s: float = 0.0
    """Seconds by which the event loop is late, in half of all measurements."""
    lag_p99_s: float = 0.0
    """The same for 99 of 100."""
    uptime_s: float = 0.0
    """Seconds since the manager began."""

    def to_json(self) -> dict[str, Any]:
        """Plain values."""
        return dataclasses.asdict(self)

    @classmethod
    def from_json(cls, values: Mapping[str, Any]) -> "Snapshot":
        """What `to_json` gave. Raises TypeError or KeyError for anything else."""
        slowest = tuple(Slow(**each) for each in values["slowest"])
        engines = {name: EngineUse(**each) for name, each in values["engines"].items()}
        return cls(**{**values, "slowest": slowest, "engines": engines})


_ADDED = ("live", "cap", "sandboxes", "max_sandboxes", "closing")
_ADDED_BY_NAME = ("queued", "phases", "phase_seconds", "events", "failures")
_HIGHEST = ("lag_p50_s", "lag_p99_s", "uptime_s")


def together(snapshots: Sequence[Snapshot]) -> Snapshot:
    """Several event loops as one: counts are added up, of lags the worst counts; engines are shared."""
    if not snapshots:
        return Snapshot()
    slowest = sorted((each for one in snapshots for each in one.slowest), key=lambda each: -each.total_s)
    values: dict[str, Any] = {name: sum(getattr(one, name) for one in snapshots) for name in _ADDED}
    for name in _ADDED_BY_NAME:
        total: Counter[str] = Counter()
        for one in snapshots:
            total.update(getattr(one, name))
        values[name] = dict(total)
    values |= {name: max(getattr(one, name) for one in snapshots) for name in _HIGHEST}
    reasons = sorted({one.cap_reason for one in snapshots if one.cap_reason})
    engines = {name: engine for one in snapshots for name, engine in one.engines.items()}
    return Snapshot(
        **values, cap_reason="; ".join(reasons), slowest=tuple(slowest[:NUM_SLOWEST]), engines=engines
    )
