"""A snapshot in Prometheus' text format: names `rollout_*`, seconds and shares, no units but SI's.

Source: Prometheus' exposition formats, text version 0.0.4.
"""

from collections.abc import Iterator, Mapping

from k25_train.rollout.manager.snapshot import Snapshot

CONTENT_TYPE = "text/plain; version=0.0.4; charset=utf-8"


def metrics_text(seen: Snapshot) -> str:
    """All of it."""
    return "".join(f"{line}\n" for line in _lines(seen))


def _lines(seen: Snapshot) -> Iterator[str]:
    # 1. Rollouts.
    yield from _one("live", "Rollouts that live.", seen.live)
    yield from _one("cap", "Rollouts that may live.", seen.cap)
    yield from _many("queued", "Rollouts that wait to be admitted.", "source", seen.queued)
    yield from _many("phase", "Rollouts by phase.", "phase", seen.phases)
    yield from _one("sandboxes", "Rollouts with a sandbox.", seen.sandboxes)
    yield from _one("sandboxes_max", "Rollouts that may have one.", seen.max_sandboxes)
    yield from _one("closing", "Teardowns that go on.", seen.closing)
    # 2. Since the beginning.
    seconds, events, failures = seen.phase_seconds, seen.events, seen.failures
    yield from _many("phase_seconds_total", "Seconds in phases.", "phase", seconds, kind="counter")
    yield from _many("events_total", "What has happened.", "kind", events, kind="counter")
    yield from _many("failures_total", "Failures by cause.", "cause", failures, kind="counter")
    # 3. Engines and the event loop.
    engines = seen.engines
    for field in ("version", "running", "waiting", "kv_use", "busy_share"):
        values = {name: getattr(use, field) for name, use in engines.items() if not use.fenced}
        yield from _many(f"engine_{field}", f"Of an engine: {field}.", "engine", values)
    fenced = {name: bool(use.fenced) for name, use in engines.items()}
    yield from _many("engine_fenced", "Whether an engine gets no requests.", "engine", fenced)
    lags = {"0.5": seen.lag_p50_s, "0.99": seen.lag_p99_s}
    yield from _many("loop_lag_seconds", "Lateness of the event loop.", "quantile", lags)
    yield from _one("uptime_seconds", "Seconds since rollouts began.", seen.uptime_s)


def _one(name: str, what: str, value: float) -> Iterator[str]:
    yield from _head(name, what, "gauge")
    yield f"rollout_{name} {value:.9g}"


def _many(
    name: str, what: str, label: str, values: Mapping[str, float], *, kind: str = "gauge"
) -> Iterator[str]:
    yield from _head(name, what, kind)
    for key, value in sorted(values.items()):
        yield f'rollout_{name}{{{label}="{_escaped(key)}"}} {float(value):.9g}'


def _head(name: str, what: str, kind: str) -> Iterator[str]:
    yield f"# HELP rollout_{name} {what}"
    yield f"# TYPE rollout_{name} {kind}"


def _escaped(value: str) -> str:
    return value.replace("\\", "\\\\").replace('"', '\\"').replace("\n", "\\n")
