"""Faults of processes: ranks are killed, asked to stop, or held still for a while."""

from __future__ import annotations

import random
import signal
import time
from functools import partial

from tests.helpers.faults.plans import DONE, KILLED, NAMED, STOPPED, Plan, draw_moment, draw_start
from tests.helpers.faults.scenes import LAYOUTS, Scene, World
from tests.helpers.faults.small_jobs import SmallJob

OTHER_LAYOUT_SHARE = 0.15
"""Share of runs that go on in another layout."""


def draw_kill(rng: random.Random, world: World) -> Plan:
    """SIGKILL of one rank or all, at any moment."""
    # A rank that loses its peer says so.
    return _draw(rng, world, "kill", [signal.SIGKILL], frozenset({KILLED, NAMED, DONE}))


def draw_stop(rng: random.Random, world: World) -> Plan:
    """A signal that asks to stop, from a scheduler or the keyboard."""
    numbers = [signal.SIGTERM, signal.SIGUSR1, signal.SIGINT]
    return _draw(rng, world, "stop", numbers, frozenset({STOPPED, DONE, KILLED, NAMED}))


def draw_pause(rng: random.Random, world: World) -> Plan:
    """SIGSTOP for a while: a rank that is slow, as under a debugger or on a node that swaps."""
    return _draw(rng, world, "pause", [signal.SIGSTOP], frozenset({DONE}))


def _draw(
    rng: random.Random, world: World, kind: str, numbers: list[signal.Signals], ends: frozenset[str]
) -> Plan:
    layout, started_at = draw_start(rng)
    moment = draw_moment(rng, world, layout, started_at)
    everyone = list(range(LAYOUTS[layout][0]))
    ranks = rng.choice([everyone, [rng.choice(everyone)]])
    number = rng.choice(numbers)
    return Plan(
        kind=kind,
        text=f"{number.name} to ranks {ranks}, {moment}",
        layout=layout,
        started_at=started_at,
        ends=ends,
        moment=moment,
        end_layout=rng.choice(list(LAYOUTS)) if rng.random() < OTHER_LAYOUT_SHARE else None,
        strike=partial(send, number=number, ranks=ranks, pause_s=rng.uniform(0.1, 1.0)),
    )


def send(_: Scene, job: SmallJob, *, number: signal.Signals, ranks: list[int], pause_s: float) -> None:
    """Send a signal; after SIGSTOP, SIGCONT a while later."""
    job.signal(number, ranks)
    if number == signal.SIGSTOP:
        time.sleep(pause_s)
        job.signal(signal.SIGCONT, ranks)
