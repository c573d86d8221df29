"""A planned disturbance: what happens to a running job, when, how often, and what it may do."""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import dataclass, field

from tests.helpers.slurm_faults.evidence import INTERVAL, NUM_STEPS
from tests.helpers.slurm_faults.judge import Expected
from tests.helpers.slurm_faults.scene import Scene

STARTING = -1
"""In place of a step: while the ranks start."""


def nothing(_: Scene) -> None:
    """Do nothing."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Plan:
    """One disturbance."""

    text: str
    """What happens, in words."""
    strike: Callable[[Scene], None]
    """Does it, and notes that it did."""
    expected: Expected
    step: int
    """When: as soon as the metrics reach this step, or `STARTING`."""
    num_strikes: int = 1
    """How often, in consecutive attempts."""
    prepare: Callable[[Scene], None] = nothing
    """What is done as soon as the run is queued."""
    repair: Callable[[Scene], None] = nothing
    """What an operator does before the `sbatch` that continues the run, if that is needed."""
    finish: Callable[[Scene], None] = nothing
    """What is waited for when the run is over."""
    overrides: list[str] = field(default_factory=list)
    """Further overrides of the run."""
    small_disk: bool = False
    """Whether the run folder has a small file system of its own."""


def draw_step(rng: random.Random, *, may_start: bool = False, after_checkpoint: bool = False) -> int:
    """When a disturbance takes place."""
    if may_start and rng.random() < 0.15:
        return STARTING
    return rng.randint(INTERVAL + 1 if after_checkpoint else 1, NUM_STEPS - 8)


def draw_spares(rng: random.Random) -> list[str]:
    """Overrides that say with which other nodes a run may go on."""
    return [f"cluster.slurm.spare_nodes={rng.randint(0, 1)}", f"cluster.slurm.min_nodes={rng.randint(1, 2)}"]


def can_replace(overrides: list[str]) -> bool:
    """Whether the run can go on without one of its nodes."""
    return "cluster.slurm.spare_nodes=1" in overrides or "cluster.slurm.min_nodes=1" in overrides
