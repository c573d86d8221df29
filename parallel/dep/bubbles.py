"""Lays the work of the vision tower into the idle times of a pipeline. Pure; standard library only.

All items of a micro-batch have to be encoded before the first chunk runs its forward pass, and their backward
can only come after that chunk's backward pass. In between stands the pipeline's own schedule, in which ranks
are idle: late stages until the first micro-batch reaches them and again at the end, early stages between
their forward passes ahead and the first backward pass, and all of them wherever a slower stage holds them up.
What fits nowhere puts off the start of the pipeline or the end of the step, for all ranks alike.

`parallel.pipeline.schedule.simulate` plays a plan: the step takes as long as planned, or less.
"""

from bisect import bisect_left, bisect_right
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from heapq import heapify, heapreplace
from typing import NamedTuple

from parallel.pipeline.simulator import Timeline, Work

NO_IDLE_S = 1e-9
"""Idle time that stages without any count as having, where ranks are compared by how much of it is filled."""
ROUNDING = 1e-9
"""Share of a step by which room may fall short of it."""

Shares = tuple[tuple[int, int], ...]
"""(position as in `parallel.pipeline.schedule.Before`, number of steps done before that pass), in order."""


class TimedItem(NamedTuple):
    """What the tower encodes as one: an image or a chunk of a video."""

    replica: int
    """Data-parallel rank that owns its sample."""
    micro_batch: int
    """Number of its micro-batch within the replica."""
    forward_s: float
    """Duration of its forward pass, with all that comes with it on the rank that encodes it."""
    backward_s: float
    """Duration of its recomputation and backward, likewise; 0 if the tower is not trained."""


class Placement(NamedTuple):
    """Where one item is encoded, step by step."""

    rank: int
    """stage * num_replicas + replica, as megatron-core numbers ranks."""
    forward: Shares
    """Position 0 is before the rank's first pass, and for the first stage before the pipeline starts."""
    backward: Shares
    """The position behind the last pass is the number of the rank's passes. None for a frozen tower."""


@dataclass(frozen=True, slots=True)
class BubblePlan:
    """Where all items of a step are encoded, both ways on the same rank."""

    placements: list[Placement]
    """Of each item."""
    head_s: float
    """How much later the pipeline starts than without a tower."""
    tail_s: float
    """How much later the step ends than the pipeline."""


def plan_bubbles(
    text: Timeline,
    items: Sequence[TimedItem],
    num_replicas: int,
    *,
    num_steps: int = 1,
    exchange_s: float = 0.0,
    gather_s: float = 0.0,
    reduce_s: float = 0.0,
) -> BubblePlan:
    """Place all items so that the step takes as long as without them, or little longer.

    Micro-batches at both ends have the fewest idle times to go to and come first, of one micro-batch the
    costliest items. An item goes to the rank that is filled least, of those with room for both its passes; if
    there is none, to where it puts off start and end least.

    Args:
        text: one replica's pipeline without other work.
        items: of all replicas.
        num_replicas: all with the pipeline `text`.
        num_steps: equal steps, such as layers of the tower, between which either pass of an item may be put
            aside for the rank's own passes.
        exchange_s: bound on the time that features take to the first stage, and gradients back.
        gather_s: time at the start of the step until the tower's weights are there.
        reduce_s: time from the end of all backward until the tower's gradients are reduced.
    """
    if not items:
        return BubblePlan([], 0.0, 0.0)
    mean_step_s = sum(item.forward_s for item in items) / (len(items) * num_steps)
    ends = _Ends(text, exchange_s, gather_s, reduce_s)
    stages = [_Stage(text, ends, stage, num_replicas, mean_step_s) for stage in range(len(text.schedules))]
    last = len(ends.deadlines_s) - 1
    placements = [Placement(0, (), ())] * len(items)

    def urgency(index: int) -> tuple[int, float, int]:
        number = items[index].micro_batch
        return min(number, last - number), -items[index].backward_s, index

    for index in sorted(range(len(items)), key=urgency):
        placements[index] = _place(items[index], stages, ends, num_steps)
    plan = BubblePlan(placements, ends.head_s, ends.tail_s)
    upfront = plan_upfront(text, items, num_replicas, num_steps=num_steps)
    around_s = 2 * exchange_s + gather_s + reduce_s
    if plan.head_s + plan.tail_s <= upfront.head_s + upfront.tail_s + around_s:
        return plan
    return BubblePlan(
        upfront.placements, upfront.head_s + gather_s + exchange_s, upfront.tail_s + exchange_s + reduce_s
    )


def plan_upfront(
    text: Timeline, items: Sequence[TimedItem], num_replicas: int, *, num_steps: int = 1
) -> BubblePlan:
    """Encode everything before the pipeline starts and do all backward when it is done.

    The costliest item goes first, to the rank with the least work. Both ends are put off by the tower alone;
    weights, gradients and features come on top.
    """
    loads = [(0.0, 0.0, rank) for rank in range(num_replicas * len(text.schedules))]
    placements = [Placement(0, (), ())] * len(items)
    for index in sorted(range(len(items)), key=lambda index: (-items[index].backward_s, index)):
        backward_s, forward_s, rank = loads[0]
        num_passes = len(text.schedules[rank // num_replicas])
        placements[index] = Placement(rank, ((0, num_steps),), ((num_passes, num_steps),))
        item = items[index]
        heapreplace(loads, (backward_s + item.backward_s, forward_s + item.forward_s, rank))
    return BubblePlan(placements, max(load[1] for load in loads), max(load[0] for load in loads))


def order_costly_to_middle(costs: Sequence[float]) -> list[int]:
    """The order of a replica's micro-batches in which the costly ones are in the middle.

    What has to be encoded for the first ones puts off the start, and what is left of the last ones puts off
    the end, however many ranks are idle then. The gradient of a step is a sum over its micro-batches, in any
    order.

    Args:
        costs: of each micro-batch, in any unit; of its costliest item, since items are not divided.

    Returns for each place in the new order the number of the micro-batch that comes there.
    """
    lightest_first = sorted(range(len(costs)), key=lambda number: (costs[number], number))
    return lightest_first[1::2] + lightest_first[::2][::-1]


def work_of(
    items: Sequence[TimedItem], placements: Sequence[Placement], num_steps: int = 1
) -> dict[tuple[int, int], list[Work]]:
    """What each rank does before each of its passes, in order, for `simulate`.

    Forward comes first, since others wait for it, and early micro-batches come before late ones.
    """
    found: dict[tuple[int, int], list[Work]] = {}
    for item, place in zip(items, placements, strict=True):
        for is_forward, shares in ((True, place.forward), (False, place.backward)):
            step_s = (item.forward_s if is_forward else item.backward_s) / num_steps
            for position, steps in shares:
                work = Work(is_forward, item.replica, item.micro_batch, steps * step_s)
                found.setdefault((place.rank, position), []).append(work)
    for works in found.values():
        works.sort(key=lambda work: (not work.is_forward, work.micro_batch))
    return found


class _Ends:
    """Between what times the items of each micro-batch can be worked on, and how far these are put off."""

    def __init__(self, text: Timeline, exchange_s: float, gather_s: float, reduce_s: float) -> None:
        self.deadlines_s = [time_s - exchange_s for time_s in text.feature_deadlines_s()]
        self.releases_s = [time_s + exchange_s for time_s in text.gradient_times_s()]
        self.end_s = text.makespan_s
        self.gather_s = gather_s
        self.reduce_s = reduce_s
        self.head_s = 0.0
        self.tail_s = 0.0


class _Queue:
    """What a rank does ahead of its first pass; or, with time running backwards, behind its last one.

    Each task has a bound, by which it has to be done unless the time is stretched, at the cost of all ranks.
    Tasks are done in the order of their bounds.
    """

    __slots__ = ("_bounds_s", "_late_s", "_totals_s")

    def __init__(self, busy_s: float) -> None:
        self._bounds_s: list[float] = []
        # [place] -> seconds ahead of this task; the most by which it or a later one misses its bound.
        self._totals_s = [busy_s]
        self._late_s = [float("-inf")]

    def stretch_s(self, bound_s: float, seconds: float) -> float:
        """How far the time has to be stretched with one more task; negative if there is time to spare."""
        place = bisect_right(self._bounds_s, bound_s)
        return max(self._totals_s[place] + seconds - bound_s, self._late_s[place] + seconds)

    def add(self, bound_s: float, seconds: float) -> None:
        place = bisect_right(self._bounds_s, bound_s)
        self._bounds_s.insert(place, bound_s)
        self._late_s.insert(place, 0.0)
        self._totals_s.insert(place, self._totals_s[place])
        for later in range(place + 1, len(self._totals_s)):
            self._totals_s[later] += seconds
        for earlier in range(len(self._bounds_s) - 1, -1, -1):
            late_s = self._totals_s[earlier + 1] - self._bounds_s[earlier]
            self._late_s[earlier] = max(late_s, self._late_s[earlier + 1])


class _Rooms:
    """What a rank has still of the idle times between its passes, its inner slots."""

    __slots__ = ("_least_s", "_next", "_previous", "rooms_s", "total_s")

    def __init__(self, rooms_s: Sequence[float], least_s: float) -> None:
        self.rooms_s = list(rooms_s)
        self.total_s = sum(rooms_s)
        self._least_s = least_s
        # Links lead past slots that are as good as full; an open slot links to itself. The last place stands
        # for what is beyond either end.
        self._next = list(range(len(self.rooms_s) + 1))
        self._previous = list(self._next)
        self._close_full(range(len(self.rooms_s)))

    def find(self, slots: range, num_steps: int, step_s: float) -> list[tuple[int, int]] | None:
        """(slot, steps) for all steps of a pass, in the order of `slots`, which has no gaps and may run
        backwards; None if there is no room."""
        if num_steps * step_s > self.total_s or not slots:
            return None
        found: list[tuple[int, int]] = []
        links = self._next if slots.step > 0 else self._previous
        slot = _follow(links, slots.start)
        while slot in slots:
            steps = min(num_steps, int(self.rooms_s[slot] / step_s + ROUNDING))
            if steps:
                found.append((slot, steps))
                num_steps -= steps
                if not num_steps:
                    return found
            slot = _follow(links, (slot + slots.step) % len(links))
        return None

    def take(self, shares: Sequence[tuple[int, int]], step_s: float) -> None:
        for slot, steps in shares:
            self.rooms_s[slot] -= steps * step_s
            self.total_s -= steps * step_s
        self._close_full([slot for slot, _ in shares])

    def _close_full(self, slots: Iterable[int]) -> None:
        for slot in slots:
            if self.rooms_s[slot] < self._least_s:
                self._next[slot] = slot + 1
                self._previous[slot] = (slot - 1) % len(self._previous)


def _follow(links: list[int], slot: int) -> int:
    """The first open slot from here on; links on the way are shortened."""
    while links[slot] != slot:
        links[slot] = links[links[slot]]
        slot = links[slot]
    return slot


class _Stage:
    """Idle times of a pipeline stage, and how its ranks, one a replica, are filled."""

    def __init__(self, text: Timeline, ends: _Ends, stage: int, num_replicas: int, least_s: float) -> None:
        self.number = stage
        self.num_replicas = num_replicas
        self.num_passes = len(text.schedules[stage])
        slots = text.slots(stage)
        self.idle_s = sum(slot.seconds for slot in slots)
        self.head_s = sum(slot.seconds for slot in slots if slot.position == 0)
        self.tail_s = sum(slot.seconds for slot in slots if slot.position == self.num_passes)
        inner = [slot for slot in slots if 0 < slot.position < self.num_passes]
        self.positions = [slot.position for slot in inner]
        self.starts_s = [slot.start_s for slot in inner]
        self.ends_s = [slot.end_s for slot in inner]
        self.first_usable = bisect_left(self.starts_s, ends.gather_s)
        self.last_usable = bisect_right(self.ends_s, ends.end_s - ends.reduce_s)
        self.rooms = [_Rooms([slot.seconds for slot in inner], least_s) for _ in range(num_replicas)]
        self.heads = [_Queue(ends.gather_s) for _ in range(num_replicas)]
        self.tails = [_Queue(ends.reduce_s) for _ in range(num_replicas)]
        # (how full, replica), the emptiest first.
        self.fill = [(0.0, replica) for replica in range(num_replicas)]
        heapify(self.fill)


class _Offer(NamedTuple):
    """Where both passes of an item have room on a rank of a stage; None stands for head or tail."""

    stage: _Stage
    replica: int
    head_stretch_s: float
    tail_stretch_s: float
    forward: list[tuple[int, int]] | None
    backward: list[tuple[int, int]] | None


def _place(item: TimedItem, stages: Sequence[_Stage], ends: _Ends, num_steps: int) -> Placement:
    """Put an item where it fits, or where the least has to be put off for it."""
    best: _Offer | None = None
    for stage in sorted(stages, key=lambda stage: (stage.fill[0][0], stage.number)):
        offer = _offer(item, stage, ends, num_steps)
        stretch_s = offer.head_stretch_s + offer.tail_stretch_s
        if best is None or stretch_s < best.head_stretch_s + best.tail_stretch_s:
            best = offer
        if stretch_s == 0:
            break
    assert best is not None, "a pipeline has a stage"
    return _accept(item, best, ends, num_steps)


def _offer(item: TimedItem, stage: _Stage, ends: _Ends, num_steps: int) -> _Offer:
    """Room on the rank of a stage that is filled least: for forward the earliest, for backward the latest in
    the second half of the micro-batches and the earliest in the first half."""
    replica, number = stage.fill[0][1], item.micro_batch
    forward = backward = None
    head_bound_s, tail_bound_s = _bounds_s(item, stage, ends)
    rooms = stage.rooms[replica]
    head_stretch_s = stage.heads[replica].stretch_s(head_bound_s, item.forward_s) - ends.head_s
    if head_stretch_s > 0:
        slots = range(stage.first_usable, bisect_right(stage.ends_s, ends.deadlines_s[number]))
        forward = rooms.find(slots, num_steps, item.forward_s / num_steps)
    tail_stretch_s = stage.tails[replica].stretch_s(tail_bound_s, item.backward_s) - ends.tail_s
    is_late = 2 * number >= len(ends.releases_s)
    if item.backward_s and (tail_stretch_s > 0 or not is_late):
        slots = range(bisect_left(stage.starts_s, ends.releases_s[number]), stage.last_usable)
        backward = rooms.find(slots[::-1] if is_late else slots, num_steps, item.backward_s / num_steps)
    return _Offer(
        stage,
        replica,
        max(head_stretch_s, 0.0) if forward is None else 0.0,
        max(tail_stretch_s, 0.0) if backward is None else 0.0,
        forward,
        backward,
    )


def _bounds_s(item: TimedItem, stage: _Stage, ends: _Ends) -> tuple[float, float]:
    """By when its forward has to be done in the head, and its backward, back from the end, in the tail."""
    head_s = min(ends.deadlines_s[item.micro_batch], stage.head_s)
    return head_s, min(ends.end_s - ends.releases_s[item.micro_batch], stage.tail_s)


def _accept(item: TimedItem, offer: _Offer, ends: _Ends, num_steps: int) -> Placement:
    stage, replica = offer.stage, offer.replica
    head_bound_s, tail_bound_s = _bounds_s(item, stage, ends)
    forward, backward = [(0, num_steps)], [(stage.num_passes, num_steps)]
    if offer.forward is None:
        stage.heads[replica].add(head_bound_s, item.forward_s)
        ends.head_s += offer.head_stretch_s
    else:
        stage.rooms[replica].take(offer.forward, item.forward_s / num_steps)
        forward = [(stage.positions[slot], steps) for slot, steps in offer.forward]
    if offer.backward is None:
        stage.tails[replica].add(tail_bound_s, item.backward_s)
        ends.tail_s += offer.tail_stretch_s
    else:
        stage.rooms[replica].take(offer.backward, item.backward_s / num_steps)
        backward = sorted((stage.positions[slot], steps) for slot, steps in offer.backward)
    filled = stage.fill[0][0] + (item.forward_s + item.backward_s) / max(stage.idle_s, NO_IDLE_S)
    heapreplace(stage.fill, (filled, replica))
    return Placement(stage.num_replicas * stage.number + replica, tuple(forward), tuple(backward))
