"""What ranks do between their passes when the tower runs in the pipeline's idle time. Pure.

`parallel.dep.bubbles` says where each item is encoded. Here that becomes chunks and, for one rank, the tasks
at each position in its list of passes, with the positions from which it takes part in the exchange. No rank
can deadlock, however long passes really take, because none waits for what only follows its own waiting:

- A rank takes part in the exchange of features micro-batch by micro-batch, and in that of gradients in the
  same order. Posting waits for nobody, as ranks have met before (`FeatureExchange.connect`).
- Only the first stage waits for features of a micro-batch, when it starts the forward pass. It has been ready
  to receive them since it started the forward pass before that one. Encoders have posted them by then: they
  take part `AHEAD` micro-batches earlier in the simulated step. Still earlier, sends would pile up on the
  GPU, each with its launch and its work for NCCL's proxy, until the host cannot post another one and stops
  with what others wait for (`tests/helpers/posted_exchanges.py` simulates it).
- Only the encoders wait for gradients of a micro-batch, in their tasks. They have been ready to receive them
  since the time at which the first stage has them in the simulated step; earlier would only hold memory.
- The encoder's gradients are reduced when a rank's own are complete, and waited for when all passes are done.
- Steps that are done early, to make room for another chunk, belong to a chunk that has its gradient already.
- All forward tasks of a micro-batch precede its use by the first stage in the simulated step, all backward
  tasks follow it. So whatever is waited for depends only on what ended earlier in the simulation.
"""

from bisect import bisect_left, bisect_right
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import groupby

from parallel.dep.bubbles import Placement
from parallel.dep.chunk_memory import ROOM_FOR_ALL, ChunkMemory, Task, within_room
from parallel.dep.cost import EncoderCost
from parallel.dep.plan import VisionItem, VisionPlan, build_plan
from parallel.dep.plan_share import PlanShare, fill_chunks
from parallel.pipeline.timeline import Timeline

AHEAD = 8
"""Micro-batches by which encoders post features before the first stage takes part. Our choice: the features
of one take about a millisecond, a pass more than a hundred."""


@dataclass(frozen=True, slots=True)
class Program:
    """What one rank does between its passes, at positions as in `parallel.pipeline.timeline.WorkBefore`."""

    tasks: Mapping[int, Sequence[Task]]
    """[position] -> what the rank does before that pass, in order."""
    features_from: Sequence[int]
    """[micro-batch] -> position from which the rank takes part in the exchange of its features, once it has
    encoded its own share."""
    gradients_from: Sequence[int]
    """[micro-batch] -> position from which the rank takes part in the exchange of their gradients."""
    reduce_from: int
    """Position from which the encoder's gradients are reduced, once the rank's own are complete."""
    num_passes: int
    """Number of the rank's passes, which is also the last position."""
    keeps_activations: Sequence[bool]
    """[chunk of the rank] -> whether it keeps its activations while its backward pass is suspended."""


def chunks_of(
    items: Sequence[VisionItem],
    placements: Sequence[Placement],
    num_ranks: int,
    cost: EncoderCost,
    max_patches_per_chunk: int,
) -> tuple[VisionPlan, list[list[Placement]]]:
    """Join items of a micro-batch with the same placement into chunks.

    Args:
        items: by replica, then micro-batch, then the order of their placeholders.
        placements: [item] -> where it is encoded.
        num_ranks: size of the job.
        cost: unit of `VisionPlan.costs`.
        max_patches_per_chunk: bound on a chunk of several items.

    Returns the plan, and [rank][chunk] -> where the chunk is encoded.
    """
    own: list[list[int]] = [[] for _ in range(num_ranks)]
    for index, placement in enumerate(placements):
        own[placement.rank].append(index)
    of_ranks = [chunks_of_rank(each, items, placements, max_patches_per_chunk) for each in own]
    ranks = [(placement.rank,) for placement in placements]
    chunks = [of_rank for of_rank, _ in of_ranks]
    return build_plan(items, ranks, chunks, cost), [places for _, places in of_ranks]


def chunks_of_rank(
    own: Sequence[int],
    items: Sequence[VisionItem],
    placements: Sequence[Placement],
    max_patches_per_chunk: int,
) -> tuple[list[list[int]], list[Placement]]:
    """[chunk of a rank] -> its items, of `own`, and where the chunk is encoded."""
    chunks: list[list[int]] = []
    places: list[Placement] = []

    def key(index: int) -> tuple[int, int, Placement]:
        return items[index].micro_batch, items[index].replica, placements[index]

    for (_, _, placement), group in groupby(sorted(own, key=key), key=key):
        filled = fill_chunks(group, items, max_patches_per_chunk)
        chunks += filled
        places += [placement] * len(filled)
    return chunks, places


def program_of(
    rank: int,
    plan: VisionPlan | PlanShare,
    placements: Sequence[Placement],
    text: Timeline,
    stage_size: int,
    reduce_s: float = 0.0,
    memory: ChunkMemory = ROOM_FOR_ALL,
) -> Program:
    """The program of one rank.

    Args:
        rank: stage * stage_size + place in the stage.
        plan: plan of the step.
        placements: [chunk of the rank] -> where it is encoded.
        text: one replica's pipeline without other work, by which the items were placed.
        stage_size: ranks of a stage.
        reduce_s: duration of the reduction of the encoder's gradients. Started much earlier than that before
            the end, it would only wait for ranks that are not ready, and slow passes down meanwhile.
        memory: what chunks take between their steps, and the room for them.
    """
    # 1. Tasks by position, in the order in which others wait for them, as in `bubbles.work_of`.
    tasks: dict[int, list[Task]] = {}
    for chunk, placement in enumerate(placements):
        for is_forward, shares in ((True, placement.forward), (False, placement.backward)):
            for position, num_steps in shares:
                tasks.setdefault(position, []).append(Task(is_forward, chunk, num_steps))
    micro_batches = [plan.items[plan.parts[parts[0]].item].micro_batch for parts in plan.chunks[rank]]
    for at_position in tasks.values():
        at_position.sort(key=lambda task: (not task.is_forward, micro_batches[task.chunk]))

    # 2. Suspended chunks stay within the room for them.
    num_patches = [sum(plan.parts[part].num_patches for part in parts) for parts in plan.chunks[rank]]
    num_steps = sum(steps for _, steps in placements[0].forward) if placements else 0
    bounded = within_room(tasks, num_patches, num_steps, memory)
    keeps = tuple(map(memory.keeps, num_patches))

    # 3. Exchange: a first stage receives features one forward pass ahead, gradients when the plan has them.
    stage = rank // stage_size
    passes, starts_s = text.schedules[stage], text.starts_s[stage]
    gradients_from = [bisect_left(starts_s, time_s) for time_s in text.gradient_times_s()]
    features_from = [bisect_left(starts_s, time_s) for time_s in sending_times_s(text)]
    if stage == 0:
        forward = [position for position, each in enumerate(passes) if each.is_forward and each.vp_stage == 0]
        features_from = [0, *forward[:-1]]

    # 4. Reduction: before the pass that is running `reduce_s` before the end.
    reduce_from = max(bisect_right(starts_s, text.makespan_s - reduce_s) - 1, 0)
    return Program(bounded, features_from, gradients_from, reduce_from, len(passes), keeps)


def receiving_times_s(text: Timeline) -> list[float]:
    """[micro-batch] -> when first stages take part in the exchange of its features: one forward pass
    ahead."""
    return [0.0, *text.feature_deadlines_s()[:-1]]


def sending_times_s(text: Timeline) -> list[float]:
    """[micro-batch] -> from when other stages do."""
    turns_s = receiving_times_s(text)
    return [turns_s[max(0, number - AHEAD)] for number in range(len(turns_s))]
