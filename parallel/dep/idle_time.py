"""The idle time of pipeline ranks, and how much of it is still free. Pure; standard library only.

A rank is idle before its first pass (its prologue), between passes (inner slots), and after its last pass
(its epilogue). Work can always be added to a prologue or an epilogue: if it does not fit, the pipeline starts
later or the step ends later, for all ranks. Work in an inner slot has to fit.
"""

from bisect import bisect_left, bisect_right
from collections.abc import Iterable, Sequence
from heapq import heapify, heapreplace

from parallel.pipeline.timeline import Timeline

MIN_IDLE_S = 1e-9
"""Idle time that stages without any count as having, where ranks are compared by how much of it is used."""
ROUNDING = 1e-9
"""Share of a step by which a slot may fall short of it."""


class Windows:
    """Between what times the items of each micro-batch can be worked on, and how far start and end move."""

    def __init__(self, text: Timeline, exchange_s: float, gather_s: float, reduce_s: float) -> None:
        self.deadlines_s = [time_s - exchange_s for time_s in text.feature_deadlines_s()]
        """[micro-batch] -> end of its forward work."""
        self.releases_s = [time_s + exchange_s for time_s in text.gradient_times_s()]
        """[micro-batch] -> earliest start of its backward work."""
        self.end_s = text.makespan_s
        self.gather_s = gather_s
        self.reduce_s = reduce_s
        self.start_delay_s = 0.0
        """How much later the pipeline starts for work in prologues."""
        self.end_delay_s = 0.0
        """How much later the step ends for work in epilogues."""


class DeadlineQueue:
    """Work in a rank's prologue, earliest deadline first; in its epilogue, with time running backwards.

    A task that misses its deadline delays all ranks by as much.
    """

    __slots__ = ("_deadlines_s", "_lateness_s", "_totals_s")

    def __init__(self, busy_s: float) -> None:
        """`busy_s` is the time until the first task can start."""
        self._deadlines_s: list[float] = []
        # [index] -> seconds ahead of this task; the most by which it or a later one misses its deadline.
        self._totals_s = [busy_s]
        self._lateness_s = [float("-inf")]

    def delay_s(self, deadline_s: float, seconds: float) -> float:
        """The delay with one more task; negative if there is slack."""
        index = bisect_right(self._deadlines_s, deadline_s)
        return max(self._totals_s[index] + seconds - deadline_s, self._lateness_s[index] + seconds)

    def add(self, deadline_s: float, seconds: float) -> None:
        """Add a task behind those with the same deadline or an earlier one."""
        index = bisect_right(self._deadlines_s, deadline_s)
        self._deadlines_s.insert(index, deadline_s)
        self._lateness_s.insert(index, 0.0)
        self._totals_s.insert(index, self._totals_s[index])
        for later in range(index + 1, len(self._totals_s)):
            self._totals_s[later] += seconds
        for earlier in range(len(self._deadlines_s) - 1, -1, -1):
            late_s = self._totals_s[earlier + 1] - self._deadlines_s[earlier]
            self._lateness_s[earlier] = max(late_s, self._lateness_s[earlier + 1])


class IdleSlots:
    """Free time in the inner slots of one rank."""

    __slots__ = ("_free_s", "_min_free_s", "_next", "_previous", "_total_free_s")

    def __init__(self, durations_s: Sequence[float], min_free_s: float) -> None:
        """A slot with less than `min_free_s` left counts as full."""
        self._free_s = list(durations_s)
        self._total_free_s = sum(durations_s)
        self._min_free_s = min_free_s
        # Links skip full slots, as in a disjoint-set forest: an open slot links to itself. The last index is
        # a sentinel for what is beyond either end.
        self._next = list(range(len(self._free_s) + 1))
        self._previous = list(self._next)
        self._close_full(range(len(self._free_s)))

    def find(self, slots: range, num_steps: int, step_s: float) -> list[tuple[int, int]] | None:
        """(slot, number of steps) for all steps of a pass; None if they do not fit.

        Args:
            slots: those that are allowed, without gaps, in the order of preference; may run backwards.
            num_steps: of the pass; each is done within one slot.
            step_s: duration of a step.
        """
        if num_steps * step_s > self._total_free_s or not slots:
            return None
        found: list[tuple[int, int]] = []
        links = self._next if slots.step > 0 else self._previous
        slot = _first_open(links, slots.start)
        while slot in slots:
            steps = min(num_steps, int(self._free_s[slot] / step_s + ROUNDING))
            if steps:
                found.append((slot, steps))
                num_steps -= steps
                if not num_steps:
                    return found
            slot = _first_open(links, (slot + slots.step) % len(links))
        return None

    def reserve(self, shares: Sequence[tuple[int, int]], step_s: float) -> None:
        """Use up what `find` found."""
        for slot, steps in shares:
            self._free_s[slot] -= steps * step_s
            self._total_free_s -= steps * step_s
        self._close_full([slot for slot, _ in shares])

    def _close_full(self, slots: Iterable[int]) -> None:
        for slot in slots:
            if self._free_s[slot] < self._min_free_s:
                self._next[slot] = slot + 1
                self._previous[slot] = (slot - 1) % len(self._previous)


def _first_open(links: list[int], slot: int) -> int:
    """The first open slot from here on; links on the way are shortened."""
    while links[slot] != slot:
        links[slot] = links[links[slot]]
        slot = links[slot]
    return slot


class StageIdleTime:
    """Idle time of a pipeline stage, and what each of its ranks has used of it."""

    def __init__(
        self, text: Timeline, windows: Windows, stage: int, num_ranks: int, min_free_s: float
    ) -> None:
        self.number = stage
        self.num_ranks = num_ranks
        self.num_passes = len(text.schedules[stage])
        slots = text.slots(stage)
        self._idle_s = sum(slot.seconds for slot in slots)
        self.prologue_s = sum(slot.seconds for slot in slots if slot.position == 0)
        self.epilogue_s = sum(slot.seconds for slot in slots if slot.position == self.num_passes)
        inner = [slot for slot in slots if 0 < slot.position < self.num_passes]
        self.positions = [slot.position for slot in inner]
        """[inner slot] -> pass that the rank waits for in it."""
        self._starts_s = [slot.start_s for slot in inner]
        self._ends_s = [slot.end_s for slot in inner]
        self._first_usable = bisect_left(self._starts_s, windows.gather_s)
        self._last_usable = bisect_right(self._ends_s, windows.end_s - windows.reduce_s)
        self.slots = [IdleSlots([slot.seconds for slot in inner], min_free_s) for _ in range(num_ranks)]
        self.prologues = [DeadlineQueue(windows.gather_s) for _ in range(num_ranks)]
        self.epilogues = [DeadlineQueue(windows.reduce_s) for _ in range(num_ranks)]
        # (share of the idle time that is used, place), the least loaded first.
        self._loads = [(0.0, place) for place in range(num_ranks)]
        heapify(self._loads)

    @property
    def least_load(self) -> float:
        """Share of its idle time that the least loaded rank has used."""
        return self._loads[0][0]

    @property
    def least_loaded(self) -> int:
        """Place of that rank in the stage."""
        return self._loads[0][1]

    def add_load(self, seconds: float) -> None:
        """Count work of the least loaded rank."""
        load, place = self._loads[0]
        heapreplace(self._loads, (load + seconds / max(self._idle_s, MIN_IDLE_S), place))

    def slots_until(self, deadline_s: float) -> range:
        """Inner slots that end by a deadline, once the tower's weights are gathered."""
        return range(self._first_usable, bisect_right(self._ends_s, deadline_s))

    def slots_from(self, release_s: float) -> range:
        """Inner slots that start after a release, early enough for the reduction of gradients."""
        return range(bisect_left(self._starts_s, release_s), self._last_usable)
