"""A planned fault: what happens to a small run, when, and which ends of it are right."""

from __future__ import annotations

import random
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

from tests.helpers.faults.moments import Moment
from tests.helpers.faults.scenes import KEEP, LAYOUTS, NUM_STEPS, Scene, World
from tests.helpers.faults.small_jobs import SmallJob

DONE, STOPPED, NAMED, KILLED = "done", "stopped", "named error", "killed"
"""How a job may end: with all its steps; with a checkpoint, as asked; with a K25Error; by a signal."""


def nothing(*_: object) -> None:
    """Do nothing."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Plan:
    """One fault. Its functions get the scene of the trial, and return nothing."""

    kind: str
    text: str
    """What happens, in words."""
    layout: str
    started_at: int
    ends: frozenset[str]
    """How the job with the fault may end."""
    prepare: Callable[[Scene], None] = nothing
    """What is done to the scene before the job starts."""
    moment: Moment | None = None
    strike: Callable[[Scene, SmallJob], None] = nothing
    """What is done at the moment, while its rank is held."""
    overrides: Sequence[str] = ()
    """Further overrides of the job with the fault."""
    repair: Callable[[Scene], None] = nothing
    """What removes the fault, before the run is restarted."""
    end_layout: str | None = None
    """The layout of the restarts, where it is another."""
    may_lose_rows: bool = False
    """Whether metrics of finished steps are lost by the fault itself."""
    first_row: int = 0
    """Step of the first row of the metrics that the fault cannot have changed."""
    num_kept: int = KEEP
    """How many of the newest sound checkpoints must survive the job with the fault."""
    ends_there: bool = False
    """Whether the run cannot go on from where the job with the fault leaves it, as the error says."""
    environment: Mapping[str, str] = field(default_factory=dict)
    """Variables of the ranks of the job with the fault."""
    folders: Sequence[str] = field(default=())
    """Folders below the scene's in which the ranks start; the scene's own if empty."""
    plant: Callable[[], None] | None = None
    """Makes the product wrong in all jobs of the trial, in tests of the bench."""
    is_relative: bool = False
    """Whether run.dir is given relative to them."""


def draw_start(rng: random.Random, earliest: int = 0) -> tuple[str, int]:
    """A layout, mostly of one rank, and the step at which the run was cut off before; 0 for a new run."""
    name = rng.choices(list(LAYOUTS), weights=[70, 15, 15])[0]
    return name, rng.choice(range(earliest, NUM_STEPS))


def draw_moment(rng: random.Random, world: World, layout: str, started_at: int) -> Moment:
    """A moment of the rest of the run: kinds of moments are equally likely, however often they come."""
    counts = world.reference(layout).counts
    name = rng.choice(sorted(counts))
    # Roughly what is left of them after the start; a moment that does not come leaves the run alone.
    left = counts[name] * (NUM_STEPS - started_at) // NUM_STEPS
    return Moment(rank=rng.randrange(LAYOUTS[layout][0]), name=name, count=rng.randint(1, max(1, left)))
