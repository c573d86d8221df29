"""Tasks on streams that share a device's resources, event by event. Pure; standard library only.

A stream runs its tasks in order; a task starts when its stream is free and the tasks that it is after have
ended. What runs concurrently shares resources. A task at full rate uses a share of each; where the shares of
all exceed a resource, rates grow alike until it is full, and those that need it stay there (max-min fairness
by progressive filling). What a task holds is taken from the others while it runs, whatever its rate: a kernel
that sends tokens keeps its multiprocessors while it waits for the network.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from enum import Enum
from typing import NamedTuple

LEAST_ROOM = 0.02
"""Share of a resource that is never held, so that tasks that need it end some time."""
_ROUNDING = 1e-12


class Resource(Enum):
    """What tasks share."""

    sms = "streaming multiprocessors"
    memory = "memory"
    nvlink = "nvlink"
    network = "network"
    to_host = "to the host"
    from_host = "from the host"


Shares = Mapping[Resource, float]
"""Resource -> share of it, 0 to 1."""
NOTHING: Shares = {}


@dataclass(frozen=True, slots=True)
class Task:
    """Something that takes time."""

    stream: str
    """Runs one task at a time, in the order of the list of tasks."""
    seconds: float
    """Duration at full rate."""
    shares: Shares = field(default_factory=dict)
    """What it uses at full rate; proportionally less at a lower one."""
    held: Shares = field(default_factory=dict)
    """What nothing else can use while it runs."""
    after: tuple[int, ...] = ()
    """Positions of earlier tasks that end before it starts."""


class Span(NamedTuple):
    """A time in which the same tasks run at the same rates."""

    start_s: float
    """When it starts."""
    seconds: float
    """Its duration."""
    running: tuple[tuple[int, float], ...]
    """Position and rate of each task that runs."""


@dataclass(frozen=True, slots=True)
class Run:
    """When everything ran."""

    tasks: tuple[Task, ...]
    """What ran."""
    starts_s: list[float]
    """[task] -> its start."""
    ends_s: list[float]
    """[task] -> its end."""
    spans: list[Span]
    """All times in order, without gaps."""

    @property
    def makespan_s(self) -> float:
        """When the last task ends."""
        return max(self.ends_s, default=0.0)

    def used_s(self, resource: Resource) -> float:
        """Seconds in which a resource is in use, as if it was used fully or not at all; what is held without
        being used is not counted."""
        of_task = [each.shares.get(resource, 0.0) for each in self.tasks]
        return sum(
            span.seconds * sum(rate * of_task[position] for position, rate in span.running)
            for span in self.spans
        )


def run_tasks(tasks: Sequence[Task]) -> Run:
    """Run all tasks, from time 0.

    Raises `ValueError` for a task that is after itself or a later one.
    """
    # 1. Each stream's tasks, and what is left of each.
    streams: dict[str, list[int]] = {}
    for position, task in enumerate(tasks):
        if any(not 0 <= before < position for before in task.after):
            raise ValueError(f"task {position} is after {task.after}: name earlier tasks only")
        streams.setdefault(task.stream, []).append(position)
    queues = [iter(positions) for positions in streams.values()]
    heads = [next(queue, None) for queue in queues]
    left_s = [task.seconds for task in tasks]
    starts_s, ends_s = [0.0] * len(tasks), [0.0] * len(tasks)
    has_ended = [False] * len(tasks)
    spans: list[Span] = []
    now_s, running = 0.0, set[int]()
    while True:
        # 2. What can start, and ends at once if it takes no time.
        moved = True
        while moved:
            moved = False
            for lane, head in enumerate(heads):
                if head is None or (
                    head not in running and not all(map(has_ended.__getitem__, tasks[head].after))
                ):
                    continue
                if head not in running:
                    starts_s[head] = now_s
                    running.add(head)
                if left_s[head] <= 0:
                    running.remove(head)
                    has_ended[head], ends_s[head] = True, now_s
                    heads[lane], moved = next(queues[lane], None), True
        if not running:
            return Run(tuple(tasks), starts_s, ends_s, spans)
        # 3. Until the first of them ends.
        rates = fair_rates(tasks, sorted(running))
        first = min(running, key=lambda position: left_s[position] / rates[position])
        seconds = left_s[first] / rates[first]
        spans.append(Span(now_s, seconds, tuple(rates.items())))
        now_s += seconds
        for position, rate in rates.items():
            left_s[position] -= seconds * rate
            if position == first or left_s[position] <= _ROUNDING * tasks[position].seconds:
                left_s[position] = 0.0


def fair_rates(tasks: Sequence[Task], running: Sequence[int]) -> dict[int, float]:
    """Position -> rate, 0 to 1, of tasks that run concurrently."""
    # 1. What is not held by others.
    room: dict[Resource, float] = {}
    for position in running:
        for resource, share in tasks[position].held.items():
            room[resource] = room.get(resource, 1.0) - share
    room = {resource: max(share, LEAST_ROOM) for resource, share in room.items()}
    # 2. Rates of all grow alike until a resource is full.
    found, growing, level = dict.fromkeys(running, 1.0), list(running), 0.0
    while growing:
        loads: dict[Resource, float] = {}
        for position in growing:
            for resource, share in tasks[position].shares.items():
                loads[resource] = loads.get(resource, 0.0) + share
        step = min((room.get(each, 1.0) / load for each, load in loads.items() if load), default=1.0)
        if level + step >= 1.0:
            return found
        level += step
        full = set()
        for resource, load in loads.items():
            room[resource] = room.get(resource, 1.0) - step * load
            if load and room[resource] <= _ROUNDING:
                full.add(resource)
        still = [each for each in growing if not any(tasks[each].shares.get(name) for name in full)]
        for position in set(growing) - set(still):
            found[position] = level
        growing = still
    return found
