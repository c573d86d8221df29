"""What ranks do between their passes when the tower's work lies in the pipeline's idle times. Pure; standard
library only.

`parallel.dep.bubbles` says where each item is encoded; here that becomes chunks, and for one rank a list of
tasks for each place in its passes, with the places from which on it takes part in the exchange. In whatever
time passes really take, no rank waits for what only comes after its own waiting:

- A rank takes part in the exchange of features micro-batch by micro-batch, and likewise in that of gradients.
  Posting waits for nobody, as ranks have met before (`FeatureExchange.connect`).
- Features of a micro-batch are waited for by its first stage alone, when it starts the forward pass. It has
  been ready to receive them since it started the forward pass before that one.
- Gradients of a micro-batch are waited for by its encoders alone, in their tasks. They have been ready to
  receive them since the time at which the first stage is to have them; earlier would only hold memory.
- The encoder's gradients are reduced when a rank's own are complete, and waited for when all passes are done.
- All forward tasks of a micro-batch come before the first stage needs it in the simulated step, all backward
  tasks after. So whatever is waited for comes from what was simulated to end before.
"""

from bisect import bisect_left, bisect_right
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import groupby
from typing import NamedTuple

from parallel.dep.bubbles import Placement
from parallel.dep.cost import EncoderCost
from parallel.dep.plan import VisionItem, VisionPlan, build_plan
from parallel.pipeline.simulator import Timeline


class Task(NamedTuple):
    """A share of a pass of the tower over a chunk; the chunk's next task goes on where it ends."""

    is_forward: bool
    chunk: int
    """Number among the rank's chunks."""
    num_steps: int
    """Of the steps that either pass consists of."""


@dataclass(frozen=True, slots=True)
class Program:
    """What one rank does between its passes. Positions are those of `parallel.pipeline.schedule.Before`."""

    tasks: Mapping[int, Sequence[Task]]
    """[position] -> what the rank does before that pass, in order."""
    features_from: Sequence[int]
    """[micro-batch] -> position from which on the rank takes part in the exchange of its features, once its
    own are there."""
    gradients_from: Sequence[int]
    """[micro-batch] -> position from which on the rank takes part in the exchange of their gradients."""
    reduce_from: int
    """Position from which on the encoder's gradients are reduced, once the rank's own are complete."""
    num_passes: int
    """Passes of the rank, which is also the last position."""


def chunks_of(
    items: Sequence[VisionItem],
    placements: Sequence[Placement],
    num_ranks: int,
    cost: EncoderCost,
    max_patches_per_chunk: int,
) -> tuple[VisionPlan, list[list[Placement]]]:
    """Join items of a micro-batch that a rank encodes at the same places into chunks.

    Args:
        items: by replica, then micro-batch, then the order of their placeholders.
        placements: of each item.
        num_ranks: of the job.
        cost: what the plan's `costs` count.
        max_patches_per_chunk: bound on a chunk of several items.

    Returns the plan, and [rank][chunk] -> where the chunk is encoded.
    """
    chunks: list[list[list[int]]] = [[] for _ in range(num_ranks)]
    places: list[list[Placement]] = [[] for _ in range(num_ranks)]

    def key(index: int) -> tuple[int, int, Placement]:
        return items[index].micro_batch, items[index].replica, placements[index]

    for (_, _, place), group in groupby(sorted(range(len(items)), key=key), key=key):
        room = 0
        for index in group:
            if items[index].num_patches > room:
                chunks[place.rank].append([])
                places[place.rank].append(place)
                room = max_patches_per_chunk
            chunks[place.rank][-1].append(index)
            room -= items[index].num_patches
    ranks = [(place.rank,) for place in placements]
    return build_plan(items, ranks, chunks, cost), places


def program_of(
    rank: int,
    plan: VisionPlan,
    places: Sequence[Placement],
    text: Timeline,
    num_replicas: int,
    reduce_s: float = 0.0,
) -> Program:
    """What a rank does.

    Args:
        rank: stage * num_replicas + replica.
        plan: of the step.
        places: of the rank's chunks.
        text: one replica's pipeline without other work, by which the items were placed.
        num_replicas: of the job.
        reduce_s: how long the encoder's gradients are reduced. Started much earlier than that before the end,
            the reduction would only wait for ranks that are not ready, and slow passes down meanwhile.
    """
    tasks: dict[int, list[Task]] = {}
    for chunk, place in enumerate(places):
        for is_forward, shares in ((True, place.forward), (False, place.backward)):
            for position, num_steps in shares:
                tasks.setdefault(position, []).append(Task(is_forward, chunk, num_steps))
    micro_batches = [plan.items[plan.parts[parts[0]].item].micro_batch for parts in plan.chunks[rank]]
    for at_position in tasks.values():
        # As in `bubbles.work_of`: others wait for features, and for the first micro-batches' the soonest.
        at_position.sort(key=lambda task: (not task.is_forward, micro_batches[task.chunk]))
    stage = rank // num_replicas
    passes, starts_s = text.schedules[stage], text.starts_s[stage]
    gradients_from = [bisect_left(starts_s, time_s) for time_s in text.gradient_times_s()]
    features_from = [0] * len(gradients_from)
    if stage == 0:
        forward = [position for position, each in enumerate(passes) if each.is_forward and each.vp_stage == 0]
        features_from = [0, *forward[:-1]]
    # In the pass that is under way then.
    reduce_from = max(bisect_right(starts_s, text.makespan_s - reduce_s) - 1, 0)
    return Program(tasks, features_from, gradients_from, reduce_from, len(passes))
