"""Which rows of features go from which rank to which. Pure.

The features [V, D] of a micro-batch are taken by the first stage of its replica. With context parallelism
that stage is several ranks, each with some of the tokens, and each row goes to the one that has its
placeholder. So an item's rows may go to several ranks, in several runs:

    micro-batch        text   item 0   text   item 1         text
    its tokens are on  0 0    0 0 1    1 1    1 1 1 1 0 0    0 1
    rows of rank 0            0 1                     2 3              runs of rows: [0, 2) of rank 0,
    rows of rank 1                0           1 2 3 4                  [2, 7) of rank 1, [7, 9) of rank 0

Both ends of a transfer find its rows in the plan and in these runs; gradients return along the same rows.
"""

import sys
from bisect import bisect_right
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import NamedTuple

import numpy as np

from parallel.dep.plan import Part, VisionItem, VisionPlan


class RowRun(NamedTuple):
    """Consecutive rows of the features of a micro-batch whose placeholders are on one rank."""

    rank: int
    """Global rank, of the replica's first stage."""
    start: int
    """First of them in the features [V, D] of the whole micro-batch."""
    stop: int
    """The one after the last."""
    offset: int
    """First of them in the features [v, D] of the rank."""


RowRuns = Callable[[int, int], Sequence[RowRun]]
"""(replica, micro-batch) -> runs that tile its features, in order."""


def of_whole_replica(replica: int, _micro_batch: int) -> Sequence[RowRun]:
    """`RowRuns` without context parallelism: the first stage of a replica is the rank of that number, and
    has all tokens."""
    return (RowRun(replica, 0, sys.maxsize, 0),)


def runs_of(placeholders: np.ndarray, starts: np.ndarray, ranks: np.ndarray) -> tuple[RowRun, ...]:
    """The runs of one micro-batch.

    Args:
        placeholders: [V] int64, positions of the placeholders in the micro-batch, ascending.
        starts: [n] int64, where stretches of tokens that one rank holds begin, ascending from 0.
        ranks: [n] int64, the global rank that holds each stretch. A rank has its tokens in order.
    """
    if not len(placeholders):
        return ()
    holders = ranks[np.searchsorted(starts, placeholders, side="right") - 1]
    firsts = [0, *(np.flatnonzero(np.diff(holders)) + 1).tolist()]
    runs: list[RowRun] = []
    num_before: dict[int, int] = {}
    for start, stop in zip(firsts, [*firsts[1:], len(holders)], strict=True):
        rank = int(holders[start])
        offset = num_before.get(rank, 0)
        num_before[rank] = offset + stop - start
        runs.append(RowRun(rank, start, stop, offset))
    return tuple(runs)


class Stretch(NamedTuple):
    """Consecutive rows of a part's features that go to one rank."""

    part: int
    """Number of the part."""
    first: int
    """First of them in the part's features."""
    num_tokens: int
    """Rows."""
    offset: int
    """First of them in the features [v, D] of the receiving rank's micro-batch."""


Transfer = dict[tuple[int, int], list[Stretch]]
"""Which features of a micro-batch go where: (sender's rank, receiver's rank) -> rows, by part and row."""


class Receiver(NamedTuple):
    """The rank whose share of a plan is made, and who receives what."""

    rank: int
    """The rank that encodes, and sends."""
    replica: int | None
    """The replica in whose first stage it is, where it receives; None on later stages."""
    num_micro_batches: int
    """Of each replica."""
    runs: RowRuns = of_whole_replica
    """Which ranks hold the tokens of each micro-batch; asked only for those of which this rank encodes or may
    receive something."""


def transfers_of(plan: VisionPlan, receiver: Receiver) -> list[Transfer]:
    """[micro-batch] -> who sends which features to whom, as far as a rank takes part.

    A transfer covers micro-batches of the same number in all replicas. Rows from one sender to one receiver
    are in the order of their offsets.
    """
    return transfers_among(enumerate(plan.parts), plan.items, receiver)


def transfers_among(
    parts: Iterable[tuple[int, Part]],
    items: Mapping[int, VisionItem] | Sequence[VisionItem],
    receiver: Receiver,
) -> list[Transfer]:
    """The same of numbered parts in order: at least those that the rank encodes or receives rows of."""
    found: list[Transfer] = [{} for _ in range(receiver.num_micro_batches)]
    for number, part in parts:
        item = items[part.item]
        if part.rank != receiver.rank and item.replica != receiver.replica:
            continue
        for run in _overlapping(receiver.runs(item.replica, item.micro_batch), part):
            # What the rank sends, and what it receives as one of a first stage.
            if receiver.rank in (part.rank, run.rank):
                start = max(part.offset, run.start)
                num_tokens = min(part.offset + part.num_tokens, run.stop) - start
                stretch = Stretch(number, start - part.offset, num_tokens, run.offset + start - run.start)
                found[item.micro_batch].setdefault((part.rank, run.rank), []).append(stretch)
    return found


def _overlapping(runs: Sequence[RowRun], part: Part) -> Sequence[RowRun]:
    """The runs that have rows of a part."""
    first = bisect_right(runs, part.offset, key=lambda run: run.stop)
    last = first
    while last < len(runs) and runs[last].start < part.offset + part.num_tokens:
        last += 1
    return runs[first:last]
