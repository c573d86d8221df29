"""Which overrides make a configuration fit, and the cheapest of them: tried, not guessed; torch-free."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from k25_train.config.schema import Config
from k25_train.plan.memory.changes import Change, changes_of
from k25_train.plan.memory.room import Fit, Room, room_of
from k25_train.plan.memory.step_cost import gpu_seconds
from k25_train.plan.pipeline import PipelinePlan, plan_pipeline

NUM_PRICED = 3
"""Of the changes that suffice, so many get a planned step."""
MOST_CHANGES = 6
"""After so many, a configuration counts as one that does not fit."""

StepCost = Callable[[PipelinePlan], float]
"""What a step costs. Units only compare: GPU-seconds, so that more nodes are no gain by themselves."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Remedy:
    """Changes in the order in which they help."""

    overrides: list[str]
    """What to add to the command line; nothing if nothing helps."""
    fit: Fit
    """How the configuration fits with them."""
    left_bytes: float
    """What they leave on the fullest stage's device; negative if it is still too little."""
    times_cost: float
    """Cost of a step with them, over that without."""

    @property
    def fits(self) -> bool:
        """Whether all devices and nodes have room with them."""
        return self.fit.is_possible


def find_remedy(pipeline: PipelinePlan, room: Room, cost: StepCost) -> Remedy:
    """Changes that make a plan fit which has so much room.

    At each turn the one that leaves the least missing; at the last, of those with which it fits, the one with
    the cheapest step. Where none makes it fit with a margin, one without is better than nothing.
    """
    first, made = cost(pipeline), dict[str, str]()
    for turns_left in reversed(range(MOST_CHANGES)):
        if room.fit is Fit.fits:
            break
        tried = [_tried(pipeline, change) for change in changes_of(pipeline, room)]
        better = [each for each in tried if each.room.shortage < room.shortage]
        if not better:
            break
        enough = [each for each in better if each.room.fit is Fit.fits]
        chosen = _cheapest(enough, cost) if enough else min(better, key=_missing)
        # Of two values of a key the later counts.
        made |= {override.partition("=")[0]: override for override in chosen.change.overrides}
        # Later changes help less than the one that helps the most: where as many of it are not enough, none
        # are.
        gained = room.shortage - chosen.room.shortage
        pipeline, room = chosen.pipeline, chosen.room
        if room.shortage > turns_left * gained:
            break
    left = 0.0 if room.device_left is None else room.device_left
    times_cost = cost(pipeline) / first if made else 1.0
    return Remedy(overrides=list(made.values()), fit=room.fit, left_bytes=left, times_cost=times_cost)


@dataclass(frozen=True, slots=True)
class _Tried:
    """A change with what it leaves."""

    change: Change
    pipeline: PipelinePlan
    room: Room


def _cheapest(tried: Sequence[_Tried], cost: StepCost) -> _Tried:
    """The one with the cheapest step, of those that an estimate says are cheap: `cost` may take long."""
    cheap = sorted(tried, key=lambda each: gpu_seconds(each.pipeline))[:NUM_PRICED]
    return min(cheap, key=lambda each: cost(each.pipeline)) if len(cheap) > 1 else cheap[0]


def _tried(pipeline: PipelinePlan, change: Change) -> _Tried:
    changed = _planned(change.config, pipeline)
    return _Tried(change, changed, room_of(changed))


def _planned(config: Config, like: PipelinePlan) -> PipelinePlan:
    """The plan of another configuration under the same assumptions."""
    return plan_pipeline(config, assumptions=like.assumptions)


def _missing(each: _Tried) -> float:
    return each.room.shortage
