"""Which engine a request goes to: where earlier turns are in the cache, unless that has more to do.

first turn ─► the engine with the least to do ─► remembered
later turn ─► the same, while it serves, has not failed of late, and is at most `SLACK` requests ahead
"""

from collections import OrderedDict
from collections.abc import Mapping, Sequence
from typing import NamedTuple

from k25_train.rollout.engines.member import Member

SLACK = 8
"""Requests that an engine may have more than the least busy one before a response leaves it. Our choice."""
REMEMBERED = 2**17
"""Responses whose engine is known: a manager's 100,000, and some."""


class Load(NamedTuple):
    """How an engine that serves is; the lowest is the best."""

    failures: int
    """Requests that failed since one succeeded."""
    running: int
    """Requests that it has."""


def response_of(key: str) -> str:
    """The response that a request is of, by its key (`rollout/session.py`)."""
    name, marked, number = key.rpartition(", turn ")
    return name if marked and number.isdigit() else key


class Routes:
    """Remembers where responses are."""

    def __init__(self) -> None:
        self._known: OrderedDict[str, int] = OrderedDict()
        self.num_kept = self.num_moved = 0
        """Later turns that went to the same engine, and to another."""

    def choose(self, key: str, loads: Mapping[int, Load]) -> int:
        """Number of the engine for a request.

        Args:
            key: of the request.
            loads: number of each serving engine -> how it is; not empty.
        """
        response = response_of(key)
        best = min(loads, key=lambda number: loads[number])
        known = self._known.pop(response, None)
        chosen = best
        if known is not None and response != key:
            load = loads.get(known)
            if load and load.failures <= loads[best].failures and load.running <= loads[best].running + SLACK:
                chosen = known
            self.num_kept += chosen == known
            self.num_moved += chosen != known
        self._known[response] = chosen
        if len(self._known) > REMEMBERED:
            self._known.popitem(last=False)
        return chosen


def chosen(routes: Routes, key: str, members: Sequence[Member]) -> Member:
    """The member for a request. At least one serves."""
    loads = {
        number: Load(each.failures, each.running)
        for number, each in enumerate(members)
        if not each.why_fenced
    }
    return members[routes.choose(key, loads)]
