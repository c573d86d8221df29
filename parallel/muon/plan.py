"""Which rank orthogonalises which matrix. Pure; standard library only.

ZeRO-1 cuts a flat buffer of parameters into equal shards, one per rank, with no regard to matrices. An update
that needs whole matrices (Muon) is therefore computed by one owner per matrix, to which the others send their
pieces and which returns their updates. Owners are chosen such that ranks have equal work, whatever they hold.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Matrix:
    """A matrix in the flat shards of a group of ranks."""

    rows: int
    cols: int
    pieces: tuple[tuple[int, int], ...]
    """(rank in the group, number of elements) of each piece, in the order of the matrix's elements."""

    @property
    def size(self) -> int:
        """Number of elements."""
        return self.rows * self.cols


@dataclass(frozen=True, slots=True)
class ExchangeRound:
    """The matrices that each rank of the group owns in one round of the exchange."""

    owned: tuple[tuple[int, ...], ...]
    """[rank in the group] -> numbers of its matrices."""


def cut(start: int, size: int, shard_size: int) -> tuple[tuple[int, int], ...]:
    """Pieces (rank, number of elements) of the range [start, start + size) of a buffer in equal shards."""
    pieces, end = [], start + size
    while start < end:
        rank = start // shard_size
        stop = min(end, (rank + 1) * shard_size)
        pieces.append((rank, stop - start))
        start = stop
    return tuple(pieces)


def newton_schulz_flops(rows: int, cols: int, steps: int) -> int:
    """FLOPs of `steps` quintic Newton-Schulz iterations X <- aX + (bA + cA²)X with A = XXᵀ.

    With m <= n the sizes of the matrix, XXᵀ and (bA + cA²)X take 2m²n each, and A² takes 2m³.
    """
    m, n = min(rows, cols), max(rows, cols)
    return steps * (4 * m * m * n + 2 * m * m * m)


def plan_owners(
    matrices: Sequence[Matrix], num_ranks: int, steps: int, busy: Sequence[int] = ()
) -> tuple[list[int], list[int]]:
    """The owner of each matrix, and the FLOPs that each rank ends up with.

    Matrices are assigned in order of decreasing cost: to the rank with the largest piece among those that
    stay within an equal share of the work, or if there is none to the rank with the least work. So no rank
    has more than an equal share plus one matrix, and what need not move stays.

    Args:
        num_ranks: size of the group.
        steps: Newton-Schulz iterations.
        busy: [rank] -> FLOPs that it has already; empty means none.
    """
    # 1. An equal share of all work.
    work = list(busy) or [0] * num_ranks
    costs = [newton_schulz_flops(matrix.rows, matrix.cols, steps) for matrix in matrices]
    share = (sum(costs) + sum(work)) / num_ranks
    # 2. Costly matrices first, ties by number: every rank finds the same owners.
    owners = [0] * len(matrices)
    for index in sorted(range(len(matrices)), key=lambda index: (-costs[index], index)):
        held = dict(matrices[index].pieces)
        # 3. The largest holder within its share, else the least busy rank.
        within = [rank for rank in held if work[rank] + costs[index] <= share]
        owner = max(within, key=lambda rank: (held[rank], -work[rank], -rank), default=-1)
        if owner < 0:
            owner = min(range(num_ranks), key=lambda rank: (work[rank], -held.get(rank, 0), rank))
        owners[index] = owner
        work[owner] += costs[index]
    return owners, work


def plan_rounds(
    matrices: Sequence[Matrix], owners: Sequence[int], num_ranks: int, max_elements: int
) -> Iterator[ExchangeRound]:
    """Rounds in which each owner has at most `max_elements`, or a single larger matrix.

    An owner's matrices of one shape are consecutive, so that they can be computed as a batch.
    """
    # Queues are emptied from the end: largest matrices first, equal shapes next to each other.
    queues: list[list[int]] = [[] for _ in range(num_ranks)]
    by_shape = sorted(range(len(matrices)), key=lambda i: (-matrices[i].size, matrices[i].rows, i))
    for index in reversed(by_shape):
        queues[owners[index]].append(index)
    while any(queues):
        yield ExchangeRound(tuple(tuple(_take(queue, matrices, max_elements)) for queue in queues))


def _take(queue: list[int], matrices: Sequence[Matrix], max_elements: int) -> list[int]:
    """Take an owner's matrices of the next round from the end of its queue."""
    taken: list[int] = []
    room = max_elements
    while queue and (not taken or matrices[queue[-1]].size <= room):
        taken.append(queue.pop())
        room -= matrices[taken[-1]].size
    return taken
