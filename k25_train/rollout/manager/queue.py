"""Which rollout begins next: fair between sources, the oldest of each first. Pure."""

import heapq
from collections import deque
from collections.abc import Callable
from itertools import count


class FairQueue[Item]:
    """Waiting items by source; each pop takes the source's oldest, sources in turn."""

    def __init__(self) -> None:
        self._heaps: dict[str, list[tuple[int, int, Item]]] = {}
        self._turns: deque[str] = deque()
        self._number = count()

    def __len__(self) -> int:
        return sum(map(len, self._heaps.values()))

    def push(self, item: Item, source: str, order: int) -> None:
        """An item waits; lower orders go first, and of equal ones who came first."""
        heap = self._heaps.get(source)
        if heap is None:
            heap = self._heaps[source] = []
            self._turns.append(source)
        heapq.heappush(heap, (order, next(self._number), item))

    def pop(self, may: Callable[[Item], bool]) -> Item | None:
        """The next item that may begin; None if no source's oldest may.

        A source whose oldest may not waits for it: what is younger does not overtake, so nothing starves.
        """
        for _ in range(len(self._turns)):
            source = self._turns[0]
            self._turns.rotate(-1)
            heap = self._heaps[source]
            if may(heap[0][2]):
                item = heapq.heappop(heap)[2]
                if not heap:
                    del self._heaps[source]
                    self._turns.remove(source)
                return item
        return None
