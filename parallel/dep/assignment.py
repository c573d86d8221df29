"""Divides the work of encoding evenly among ranks. Pure; standard library only.

To give items of different cost to ranks so that the busiest has little is "multiprocessor scheduling". The
costliest item is always dealt first, by one of two rules:

- Longest processing time: to the rank with the least work. So no rank exceeds the mean by a whole item, and
  with many items a rank the small ones at the end level everything out.
- Best fit, tried if a rank is above the limit after that: to the rank that has the least room, of those that
  have enough below the limit. So wide room is kept for later items, which helps where a rank gets few of
  them. An item for which no rank has room is split, or goes to the rank with the least work.

A split item is dealt to the ranks with the least work, in equal shares of rows. They have to exchange keys
and values in each layer, so one that had less of it would only wait; it counts as busy until all are done.
"""

from bisect import bisect_left, insort
from collections.abc import Sequence
from typing import NamedTuple

TARGET_PERCENT = 102
"""Work of the busiest rank, in percent of the mean, that is good enough: what stops the search."""


class _Deal(NamedTuple):
    """How items were dealt by one rule."""

    busiest: int
    """Cost of the busiest rank, its waiting included."""
    ranks: list[tuple[int, ...]]
    """[item] -> ranks that encode it."""


def assign_items(
    row_costs: Sequence[int], num_rows: Sequence[int], num_ranks: int, split: bool
) -> list[tuple[int, ...]]:
    """[item] -> ranks that encode it, in the order of their rows; `equal_rows` says how many each.

    Args:
        row_costs: [item] -> cost of one of its rows, any unit.
        num_rows: [item] -> number of rows, all of one cost.
        num_ranks: ranks to divide among.
        split: whether rows of one item may go to several ranks. They do if the item alone is above the limit,
            or if no rank has room for it and the limit is missed otherwise.
    """
    costs = [cost * rows for cost, rows in zip(row_costs, num_rows, strict=True)]
    largest = max(row_costs if split else costs, default=0)
    limit = max(TARGET_PERCENT * sum(costs) // (100 * num_ranks), largest)
    order = sorted(range(len(costs)), key=lambda item: -costs[item])
    rules = [(split, False), (split, True)]
    if split:
        # Rows can be so coarse that their ranks wait for one another longer than one takes for a whole item.
        rules.append((False, False))
    deals: list[_Deal] = []
    for may_split, best_fit in rules:
        deals.append(_deal(row_costs, num_rows, order, num_ranks, limit, may_split, best_fit))
        if deals[-1].busiest <= limit:
            break
    return min(deals, key=lambda deal: deal.busiest).ranks


def equal_rows(num_rows: int, num_shares: int) -> list[int]:
    """Rows of each share; the first ones have one more if it does not come out even."""
    least, more = divmod(num_rows, num_shares)
    return [least + 1] * more + [least] * (num_shares - more)


def _deal(
    row_costs: Sequence[int],
    num_rows: Sequence[int],
    order: Sequence[int],
    num_ranks: int,
    limit: int,
    split: bool,
    best_fit: bool,
) -> _Deal:
    """Deal items in this order, by best fit or to the rank with the least work."""
    # (what may still be added up to the limit, rank), the least room first; negative above the limit.
    rooms = [(limit, rank) for rank in range(num_ranks)]
    ranks: list[tuple[int, ...]] = [()] * len(order)
    for item in order:
        cost = row_costs[item] * num_rows[item]
        place = bisect_left(rooms, (cost, 0)) if best_fit else num_ranks - 1
        num_shares = 1
        if split and (cost > limit or place == num_ranks):
            num_shares = _num_shares(rooms, row_costs[item], num_rows[item])
        if num_shares == 1:
            room, rank = rooms.pop(min(place, num_ranks - 1))
            ranks[item] = (rank,)
            insort(rooms, (room - cost, rank))
        else:
            taken = rooms[-num_shares:]
            del rooms[-num_shares:]
            room = taken[0][0] - -(-num_rows[item] // num_shares) * row_costs[item]
            ranks[item] = tuple([rank for _, rank in taken])
            for rank in ranks[item]:
                insort(rooms, (room, rank))
    return _Deal(limit - rooms[0][0], ranks)


def _num_shares(rooms: Sequence[tuple[int, int]], row_cost: int, num_rows: int) -> int:
    """For an item that no rank has room for: the fewest equal shares that the ranks with the most room have
    room for, or if there are none, those that exceed it least."""
    best, least_excess = 1, row_cost * num_rows - rooms[-1][0]
    for num_shares in range(2, min(num_rows, len(rooms)) + 1):
        excess = -(-num_rows // num_shares) * row_cost - rooms[-num_shares][0]
        if excess <= 0:
            return num_shares
        if excess < least_excess:
            best, least_excess = num_shares, excess
    return best
