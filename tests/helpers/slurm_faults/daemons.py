"""SLURM itself is away for a while: its controller, its authentication."""

from __future__ import annotations

import random
import signal
import time
from functools import partial

from tests.helpers.slurm_faults.evidence import FAILED, FINISHED
from tests.helpers.slurm_faults.judge import Expected
from tests.helpers.slurm_faults.plans import Plan, draw_spares, draw_step
from tests.helpers.slurm_faults.scene import Scene


def controller_away(rng: random.Random) -> Plan:
    """slurmctld is killed and comes back."""
    return _away(rng, "slurmctld", rng.uniform(1, 25))


def authentication_away(rng: random.Random) -> Plan:
    """munged is killed and comes back, before SLURM takes its nodes for lost."""
    return _away(rng, "munged", rng.uniform(1, 8))


def _away(rng: random.Random, name: str, away_s: float) -> Plan:
    """Alone, or when a rank is killed, or the job is asked to stop, meanwhile."""
    meanwhile = rng.choice(["nothing", "SIGKILL of rank 1"])
    outcome = FINISHED if meanwhile == "nothing" else FAILED
    return Plan(
        text=f"{name} away for {away_s:.0f} s, meanwhile {meanwhile}",
        strike=partial(_take_away, name=name, away_s=away_s, kills=meanwhile != "nothing"),
        expected=Expected(
            outcomes=frozenset({outcome}),
            max_steps_lost=0 if meanwhile == "nothing" else 6,
            max_attempts=1 if meanwhile == "nothing" else 2,
        ),
        step=draw_step(rng),
        overrides=draw_spares(rng),
    )


def _take_away(scene: Scene, *, name: str, away_s: float, kills: bool) -> None:
    scene.wait_for_ranks()
    node = scene.node_of(1)
    pid = scene.ranks()[node]
    scene.note(node if kills else None)
    scene.cluster.end(name, signal.SIGKILL)
    if kills:
        scene.kill(pid, signal.SIGKILL)
    # Not `pause`, which asks SLURM: without munged, its commands take longer than SLURM waits for nodes.
    time.sleep(away_s)
    scene.cluster.start(name)
