"""Schedules the work of the vision tower in the idle time of a pipeline. Pure; standard library only.

All items of a micro-batch have to be encoded before the first chunk runs its forward pass, and their backward
can only start after that chunk's backward pass. In between, the pipeline's own schedule leaves ranks idle:
late stages until the first micro-batch reaches them and again at the end, early stages between their warm-up
and the first backward pass, and all of them wherever a slower stage holds them up. Work that fits nowhere
delays the start of the pipeline or the end of the step, for all ranks alike.

    idle_time.py      what is idle, and still free                        -> a stage's slots and queues
    plan_bubbles      items by urgency, each to the candidate rank that delays the step least
    work_of           the placements as work before each pass             -> parallel.pipeline.simulator

`parallel.pipeline.simulator.simulate` replays a plan: the step takes as long as planned, or less.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from heapq import heapreplace
from itertools import chain
from typing import NamedTuple

from parallel.dep.idle_time import StageIdleTime, Windows
from parallel.pipeline.timeline import Timeline, Work

Shares = tuple[tuple[int, int], ...]
"""(position as in `parallel.pipeline.timeline.WorkBefore`, number of steps done there), in order."""


class TimedItem(NamedTuple):
    """An image or a chunk of a video, with the durations of its two passes through the tower."""

    replica: int
    """Data-parallel rank that owns its sample."""
    micro_batch: int
    """Number of its micro-batch within the replica."""
    forward_s: float
    """Duration of its forward pass on the rank that encodes it, including the copy of its pixels."""
    backward_s: float
    """Duration of its recomputation and backward, including the copy; 0 if the tower is not trained."""


class Placement(NamedTuple):
    """Where one item is encoded, step by step."""

    rank: int
    """stage * stage_size + place in the stage, as megatron-core numbers ranks."""
    forward: Shares
    """Position 0 is before the rank's first pass, and for the first stage before the pipeline starts."""
    backward: Shares
    """The position after the last pass is the number of the rank's passes. Empty for a frozen tower."""


@dataclass(frozen=True, slots=True)
class BubblePlan:
    """Where all items of a step are encoded; forward and backward on the same rank."""

    placements: list[Placement]
    """[item] -> its placement."""
    start_delay_s: float
    """How much later the pipeline starts than without a tower."""
    end_delay_s: float
    """How much later the step ends than the pipeline."""


def plan_bubbles(
    text: Timeline,
    items: Sequence[TimedItem],
    stage_size: int,
    *,
    num_steps: int = 1,
    exchange_s: float = 0.0,
    gather_s: float = 0.0,
    reduce_s: float = 0.0,
) -> BubblePlan:
    """Place all items so that the step takes as long as without them, or little longer.

    Micro-batches at both ends have the least idle time to go to and are placed first, of one micro-batch the
    costliest items. An item goes to the least loaded rank of those with free time for both its passes; if
    there is none, to the one on which it delays start and end least.

    Args:
        text: one replica's pipeline without other work.
        items: items of all replicas.
        stage_size: ranks of a stage: replicas, all with the pipeline `text`, times those that share a
            replica's tokens.
        num_steps: equal steps, such as layers of the tower, between which either pass of an item may be
            suspended for the rank's own passes.
        exchange_s: bound on the time that features take to the first stage, and gradients back.
        gather_s: time at the start of the step until the tower's weights are gathered.
        reduce_s: time from the end of all backward until the tower's gradients are reduced.
    """
    if not items:
        return BubblePlan([], 0.0, 0.0)
    # 1. What is idle. A slot with less than the mean step left is not worth looking at.
    mean_step_s = sum(item.forward_s for item in items) / (len(items) * num_steps)
    windows = Windows(text, exchange_s, gather_s, reduce_s)
    stages = [
        StageIdleTime(text, windows, stage, stage_size, mean_step_s) for stage in range(len(text.schedules))
    ]
    last = len(windows.deadlines_s) - 1
    placements = [Placement(0, (), ())] * len(items)

    def urgency(index: int) -> tuple[int, float, int]:
        number = items[index].micro_batch
        return min(number, last - number), -items[index].backward_s, index

    # 2. One item after another, the most urgent first.
    for index in sorted(range(len(items)), key=urgency):
        placements[index] = _place(items[index], stages, windows, num_steps)
    plan = BubblePlan(placements, windows.start_delay_s, windows.end_delay_s)

    # 3. With more work than idle time, encoding everything around the pipeline can be shorter.
    upfront = plan_upfront(text, items, stage_size, num_steps=num_steps)
    around_s = 2 * exchange_s + gather_s + reduce_s
    if plan.start_delay_s + plan.end_delay_s <= upfront.start_delay_s + upfront.end_delay_s + around_s:
        return plan
    return BubblePlan(
        upfront.placements,
        upfront.start_delay_s + gather_s + exchange_s,
        upfront.end_delay_s + exchange_s + reduce_s,
    )


def plan_upfront(
    text: Timeline, items: Sequence[TimedItem], stage_size: int, *, num_steps: int = 1
) -> BubblePlan:
    """Encode everything before the pipeline starts and do all backward when it is done.

    The costliest item goes first, to the rank with the least work. The delays are those of the tower alone,
    without the time for weights, gradients and features.
    """
    loads = [(0.0, 0.0, rank) for rank in range(stage_size * len(text.schedules))]
    placements = [Placement(0, (), ())] * len(items)
    for index in sorted(range(len(items)), key=lambda index: (-items[index].backward_s, index)):
        backward_s, forward_s, rank = loads[0]
        num_passes = len(text.schedules[rank // stage_size])
        placements[index] = Placement(rank, ((0, num_steps),), ((num_passes, num_steps),))
        item = items[index]
        heapreplace(loads, (backward_s + item.backward_s, forward_s + item.forward_s, rank))
    return BubblePlan(placements, max(load[1] for load in loads), max(load[0] for load in loads))


def order_costly_to_middle(costs: Sequence[float]) -> list[int]:
    """The order of a replica's micro-batches in which the costly ones are in the middle.

    Encoding the first ones delays the start, and backward of the last ones delays the end, however many ranks
    are idle then. The gradient of a step is a sum over its micro-batches, in any order.

    Args:
        costs: [micro-batch] -> cost of its costliest item, since items are not divided; any unit.

    Returns for each position in the new order the number of the micro-batch.
    """
    lightest_first = sorted(range(len(costs)), key=lambda number: (costs[number], number))
    return lightest_first[1::2] + lightest_first[::2][::-1]


def work_of(
    items: Sequence[TimedItem], placements: Sequence[Placement], num_steps: int = 1
) -> dict[tuple[int, int], list[Work]]:
    """What each rank does before each of its passes, in order, for `simulate`.

    Forward comes first, because others wait for it, and early micro-batches come before late ones.
    """
    found: dict[tuple[int, int], list[Work]] = {}
    for item, placement in zip(items, placements, strict=True):
        for is_forward, shares in ((True, placement.forward), (False, placement.backward)):
            step_s = (item.forward_s if is_forward else item.backward_s) / num_steps
            for position, steps in shares:
                work = Work(is_forward, item.replica, item.micro_batch, steps * step_s)
                found.setdefault((placement.rank, position), []).append(work)
    for works in found.values():
        works.sort(key=lambda work: (not work.is_forward, work.micro_batch))
    return found


class _Candidate(NamedTuple):
    """Where both passes of an item would go on the least loaded rank of a stage."""

    stage: StageIdleTime
    start_delay_s: float
    """How much later than now the pipeline would start."""
    end_delay_s: float
    """How much later than now the step would end."""
    forward: list[tuple[int, int]] | None
    """(inner slot, steps); None for the prologue."""
    backward: list[tuple[int, int]] | None
    """(inner slot, steps); None for the epilogue."""


def _place(item: TimedItem, stages: Sequence[StageIdleTime], windows: Windows, num_steps: int) -> Placement:
    """Put an item where it fits, or where it delays the step least."""
    best: _Candidate | None = None
    # Stages from the least loaded one on; mostly the first has the time.
    loads = [(stage.least_load, stage.number) for stage in stages]
    first = min(loads)
    candidates = chain((first,), (each for each in sorted(loads) if each != first))
    for stage in (stages[number] for _, number in candidates):
        candidate = _candidate_on(stage, item, windows, num_steps)
        delay_s = candidate.start_delay_s + candidate.end_delay_s
        if best is None or delay_s < best.start_delay_s + best.end_delay_s:
            best = candidate
        if delay_s == 0:
            break
    assert best is not None, "a pipeline has a stage"
    return _commit(best, item, windows, num_steps)


def _candidate_on(stage: StageIdleTime, item: TimedItem, windows: Windows, num_steps: int) -> _Candidate:
    """Where an item would go on the least loaded rank of a stage."""
    place, number = stage.least_loaded, item.micro_batch
    slots = stage.slots[place]
    forward = backward = None
    prologue_deadline_s, epilogue_deadline_s = _deadlines_s(item, stage, windows)

    # Forward: in the prologue as long as that delays nothing, otherwise in the earliest inner slots.
    start_s = stage.prologues[place].delay_s(prologue_deadline_s, item.forward_s)
    start_delay_s = start_s - windows.start_delay_s
    if start_delay_s > 0:
        allowed = stage.slots_until(windows.deadlines_s[number])
        forward = slots.find(allowed, num_steps, item.forward_s / num_steps)

    # Backward in the first half of the micro-batches: in the earliest inner slots, otherwise in the epilogue.
    # In the second half: in the epilogue as long as that delays nothing, otherwise in the latest inner slots.
    end_s = stage.epilogues[place].delay_s(epilogue_deadline_s, item.backward_s)
    end_delay_s = end_s - windows.end_delay_s
    is_late = 2 * number >= len(windows.releases_s)
    if item.backward_s and (end_delay_s > 0 or not is_late):
        allowed = stage.slots_from(windows.releases_s[number])
        backward = slots.find(allowed[::-1] if is_late else allowed, num_steps, item.backward_s / num_steps)

    # Only what has to go to the prologue or the epilogue can delay the step.
    return _Candidate(
        stage,
        max(start_delay_s, 0.0) if forward is None else 0.0,
        max(end_delay_s, 0.0) if backward is None else 0.0,
        forward,
        backward,
    )


def _deadlines_s(item: TimedItem, stage: StageIdleTime, windows: Windows) -> tuple[float, float]:
    """Deadlines of its forward in the prologue, and of its backward in the epilogue, counted from the end."""
    forward_s = min(windows.deadlines_s[item.micro_batch], stage.prologue_s)
    return forward_s, min(windows.end_s - windows.releases_s[item.micro_batch], stage.epilogue_s)


def _commit(candidate: _Candidate, item: TimedItem, windows: Windows, num_steps: int) -> Placement:
    """Use up the idle time that a candidate takes."""
    stage, place = candidate.stage, candidate.stage.least_loaded
    prologue_deadline_s, epilogue_deadline_s = _deadlines_s(item, stage, windows)
    forward, backward = [(0, num_steps)], [(stage.num_passes, num_steps)]
    if candidate.forward is None:
        stage.prologues[place].add(prologue_deadline_s, item.forward_s)
        windows.start_delay_s += candidate.start_delay_s
    else:
        stage.slots[place].reserve(candidate.forward, item.forward_s / num_steps)
        forward = [(stage.positions[slot], steps) for slot, steps in candidate.forward]
    if candidate.backward is None:
        stage.epilogues[place].add(epilogue_deadline_s, item.backward_s)
        windows.end_delay_s += candidate.end_delay_s
    else:
        stage.slots[place].reserve(candidate.backward, item.backward_s / num_steps)
        backward = sorted((stage.positions[slot], steps) for slot, steps in candidate.backward)
    stage.add_load(item.forward_s + item.backward_s)
    return Placement(stage.num_ranks * stage.number + place, tuple(forward), tuple(backward))
