"""Assigns items to ranks so that the busiest rank has little to do. Pure; standard library only.

This is "multiprocessor scheduling". Items are assigned from costly to cheap, by one of two rules:

- Longest processing time first: each item to the rank with the least work. No rank exceeds the mean by a
  whole item, and with many items per rank the small ones at the end even everything out.
- Best fit, tried if a rank is above the limit after that: each item to the rank with the least slack below
  the limit, of those with enough. So large slack is kept for later items, which helps where a rank gets few
  of them. An item that fits on no rank is split, or goes to the rank with the least work.

A split item is assigned to the ranks with the least work, in equal shares of rows. They exchange keys and
values in each layer, so one with a smaller share would only wait; it counts as busy until all are done.
"""

from bisect import bisect_left, insort
from collections.abc import Sequence
from heapq import heapify, heapreplace
from typing import NamedTuple

TARGET_PERCENT = 102
"""Work of the busiest rank, in percent of the mean, at which the search stops."""


class _Assignment(NamedTuple):
    """The result of one rule."""

    max_cost: int
    """Cost of the busiest rank, including its waiting."""
    ranks: list[tuple[int, ...]]
    """[item] -> ranks that encode it."""


def assign_items(
    row_costs: Sequence[int], num_rows: Sequence[int], num_ranks: int, split: bool
) -> list[tuple[int, ...]]:
    """[item] -> ranks that encode it, in the order of their rows; `equal_rows` gives the rows of each.

    Args:
        row_costs: [item] -> cost of one of its rows, any unit.
        num_rows: [item] -> number of rows, all of equal cost.
        num_ranks: number of ranks to assign to.
        split: whether rows of one item may go to several ranks. They do if the item alone is above the limit,
            or if it fits on no rank and the limit is missed otherwise.
    """
    # 1. The limit: the target, or what cannot be divided.
    costs = [cost * rows for cost, rows in zip(row_costs, num_rows, strict=True)]
    largest = max(row_costs if split else costs, default=0)
    limit = max(TARGET_PERCENT * sum(costs) // (100 * num_ranks), largest)
    order = sorted(range(len(costs)), key=lambda item: -costs[item])

    # 2. Rules, as (may split, best fit).
    rules = [(split, False), (split, True)]
    if split:
        # Rows can be so coarse that their ranks wait for one another longer than one takes for a whole item.
        rules.append((False, False))

    # 3. The first result within the limit, or else the best.
    found: list[_Assignment] = []
    for may_split, best_fit in rules:
        if best_fit or (may_split and costs and max(costs) > limit):
            found.append(_assign(row_costs, num_rows, order, num_ranks, limit, may_split, best_fit))
        else:
            found.append(_assign_whole(costs, order, num_ranks))
        if found[-1].max_cost <= limit:
            break
    return min(found, key=lambda assignment: assignment.max_cost).ranks


def equal_rows(num_rows: int, num_shares: int) -> list[int]:
    """Rows of each share; the first ones have one more if the rows do not divide evenly."""
    least, remainder = divmod(num_rows, num_shares)
    return [least + 1] * remainder + [least] * (num_shares - remainder)


def _assign_whole(costs: Sequence[int], order: Sequence[int], num_ranks: int) -> _Assignment:
    """Assign items in this order to the rank with the least work, of equals the last."""
    # One number for work and rank compares faster than a pair.
    loads = [num_ranks - 1 - rank for rank in range(num_ranks)]
    heapify(loads)
    ranks: list[tuple[int, ...]] = [()] * len(order)
    for item in order:
        ranks[item] = (num_ranks - 1 - loads[0] % num_ranks,)
        heapreplace(loads, loads[0] + costs[item] * num_ranks)
    return _Assignment(max(loads) // num_ranks, ranks)


def _assign(
    row_costs: Sequence[int],
    num_rows: Sequence[int],
    order: Sequence[int],
    num_ranks: int,
    limit: int,
    split: bool,
    best_fit: bool,
) -> _Assignment:
    """Assign items in this order, by best fit or to the rank with the least work."""
    # (what may still be added below the limit, rank), the least slack first; negative above the limit.
    slacks = [(limit, rank) for rank in range(num_ranks)]
    ranks: list[tuple[int, ...]] = [()] * len(order)
    for item in order:
        cost = row_costs[item] * num_rows[item]
        # The rank with the least slack that suffices, past the end if none does; or the one with the most.
        index = bisect_left(slacks, (cost, 0)) if best_fit else num_ranks - 1
        num_shares = 1
        if split and (cost > limit or index == num_ranks):
            num_shares = _num_shares(slacks, row_costs[item], num_rows[item])
        if num_shares == 1:
            slack, rank = slacks.pop(min(index, num_ranks - 1))
            ranks[item] = (rank,)
            insort(slacks, (slack - cost, rank))
        else:
            # All ranks of a split item are busy until the one with the least slack is done.
            chosen = slacks[-num_shares:]
            del slacks[-num_shares:]
            slack = chosen[0][0] - -(-num_rows[item] // num_shares) * row_costs[item]
            ranks[item] = tuple([rank for _, rank in chosen])
            for rank in ranks[item]:
                insort(slacks, (slack, rank))
    return _Assignment(limit - slacks[0][0], ranks)


def _num_shares(slacks: Sequence[tuple[int, int]], row_cost: int, num_rows: int) -> int:
    """For an item that fits on no rank: the fewest equal shares that fit on the ranks with the most slack, or
    if there are none, the number of shares that exceeds their slack least."""
    best, least_excess = 1, row_cost * num_rows - slacks[-1][0]
    for num_shares in range(2, min(num_rows, len(slacks)) + 1):
        excess = -(-num_rows // num_shares) * row_cost - slacks[-num_shares][0]
        if excess <= 0:
            return num_shares
        if excess < least_excess:
            best, least_excess = num_shares, excess
    return best
