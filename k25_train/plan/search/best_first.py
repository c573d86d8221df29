"""Branch and bound: what has the lowest bound comes first, until no bound is low enough; torch-free.

It knows nothing of layouts. An item is either opened into others, each with a bound that is at least its
own, or tried. Whatever the number of workers and the order in which they answer, the same items are among
the best: those whose bound exceeds the last of the best are of no account, tried or not.
"""

import heapq
from collections.abc import Callable, Hashable, Iterable, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, wait
from dataclasses import dataclass, field
from typing import Any, Protocol

Answer = Sequence["Item"] | float
"""What an item was opened into, or the value of one that was tried; infinite if it is of no use."""

NOTHING = float("inf"), ""
"""Value and name of the best where there is none."""


@dataclass(frozen=True, slots=True, order=True)
class Item:
    """Something to open or to try."""

    rank: float
    """When its turn is: those with the lowest first."""
    name: str
    """Of equal values the one with the first name is the best; empty for what is opened."""
    bound: float = field(compare=False)
    """The least value that it, or any that it is opened into, can have."""
    group: Hashable = field(compare=False)
    """Of each group the best one counts."""
    what: Any = field(compare=False)
    """The item itself."""


class Workers(Protocol):
    """Where items are opened and tried."""

    num_at_a_time: int
    """How many items are handed out before the first answer."""

    def submit(self, what: Any) -> "Future[Any]":
        """Open or try an item."""


@dataclass(slots=True)
class Found:
    """The best values so far, and how the search went."""

    num_best: int
    """How many groups are wanted at most."""
    window: float
    """Share by which the last of them may be above the best."""
    best: dict[Hashable, tuple[float, str]] = field(default_factory=dict)
    """Group -> its best value, and the name of what has it."""
    num_answers: int = 0
    """Items that were opened or tried."""
    num_left: int = 0
    """Items that nothing needs any more, as far as they are known by name."""
    is_complete: bool = True
    """Whether no item was left that could have been among the best."""

    @property
    def limit(self) -> float:
        """Value that an item has to reach to be among the best."""
        values = sorted(value for value, _ in self.best.values())
        if not values:
            return float("inf")
        within = values[0] * (1 + self.window)
        return min(within, values[self.num_best - 1]) if len(values) >= self.num_best else within

    def needs(self, item: Item) -> bool:
        """Whether an item can still change what is best."""
        best = self.best.get(item.group, NOTHING)
        return item.bound <= self.limit and (item.bound, item.name) <= best

    def take(self, item: Item, value: float) -> None:
        """Note the value of an item."""
        if value < float("inf"):
            self.best[item.group] = min(self.best.get(item.group, NOTHING), (value, item.name))


def search(
    items: Iterable[Item],
    workers: Workers,
    on_answer: Callable[[Item, Any], Answer],
    *,
    num_best: int,
    window: float,
    gives_up: Callable[[int], bool],
    told: Callable[[Found, int], None] = lambda *_: None,
) -> Found:
    """Open and try items until the best of `num_best` groups are known.

    Args:
        items: those to start with.
        workers: what opens and tries them.
        on_answer: turns a worker's answer into items or a value.
        num_best: groups whose best value is wanted, at most.
        window: share by which these may be above the best of all.
        gives_up: asked with the number of answers so far; `is_complete` says whether it was.
        told: called after each answer with what is found, and how many items are open.
    """
    heap, found = list(items), Found(num_best, window)
    heapq.heapify(heap)
    waiting: dict[Future[Any], Item] = {}
    while True:
        # 1. Hand out what is needed, the lowest bounds first.
        while heap and len(waiting) < workers.num_at_a_time:
            item = heapq.heappop(heap)
            if not found.needs(item):
                found.num_left += 1
                continue
            if gives_up(found.num_answers + len(waiting)):
                found.is_complete = False
                heap.clear()
                break
            waiting[workers.submit(item.what)] = item
        if not waiting:
            return found
        # 2. Take what is answered.
        done, _ = wait(waiting, return_when=FIRST_COMPLETED)
        for future in done:
            item = waiting.pop(future)
            answer = on_answer(item, future.result())
            found.num_answers += 1
            if isinstance(answer, float):
                found.take(item, answer)
            else:
                for each in answer:
                    heapq.heappush(heap, each)
            told(found, len(heap) + len(waiting))
