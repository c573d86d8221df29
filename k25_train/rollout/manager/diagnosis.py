"""What a rollout that does not move waits for, in words: pure, from what the manager knows."""

from collections.abc import Mapping

from k25_train.rollout.manager.admission import Cap
from k25_train.rollout.manager.snapshot import EngineUse

GENERATE = "generate"
"""Phase in which engines are waited for."""


def stuck(who: str, phase: str, detail: str, silent_s: float, trouble: str, engines: str) -> str:
    """The line of the log for a rollout without progress.

    Args:
        who: task, and source.
        phase: that it is in.
        detail: what it said of it.
        silent_s: seconds without progress.
        trouble: what failed there last; empty for nothing.
        engines: how engines are (`engine_words`), which matters where they are waited for.
    """
    parts = [f"{who}: stuck, no progress for {silent_s:.1f} s in phase {phase}"]
    if detail:
        parts.append(detail)
    if trouble:
        parts.append(f"last failure: {trouble}")
    if phase == GENERATE and engines:
        parts.append(engines)
    return "; ".join(parts)


def engine_words(engines: Mapping[str, EngineUse]) -> str:
    """How engines are, in short; the first few."""
    found = [
        f"{name}: fenced off ({use.fenced})"
        if use.fenced
        else f"{name}: {use.running:,} running, {use.waiting:,} waiting, version {use.version}"
        for name, use in sorted(engines.items(), key=lambda each: not each[1].fenced)[:3]
    ]
    return "engines: " + ", ".join(found) if found else ""


def held_back(
    who: str, waited_s: float, num_queued: int, cap: Cap, live: int, sandboxes: tuple[int, int]
) -> str:
    """The line of the log for a queue from which nothing was admitted for long.

    Args:
        who: the one that waits longest.
        waited_s: seconds since one was admitted.
        num_queued: how many wait.
        cap: that holds.
        live: rollouts that live.
        sandboxes: rollouts with one, and how many may have one.
    """
    used, most = sandboxes
    if live >= cap.value:
        cause = f"{live:,} of {cap.value:,} rollouts live ({cap.reason}), and none ends"
    elif used >= most:
        cause = f"{used:,} of {most:,} sandboxes are in use, and none becomes free"
    else:
        cause = "nothing holds it back, so that this is a fault of the manager"
    return (
        f"{who}: stuck in phase queued; nothing was admitted for {waited_s:.1f} s, and {num_queued:,} wait: "
        f"{cause}"
    )


def stale(name: str, version: int, due: int, lasted_s: float) -> str:
    """The line of the log for an engine with old weights.

    Args:
        name: of the engine.
        version: that it has.
        due: that the pool has.
        lasted_s: seconds for which that is so.
    """
    return (
        f"{name}: stale weights for {lasted_s:.1f} s: it samples from version {version}, "
        f"where version {due} is due"
    )
