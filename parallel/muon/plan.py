"""Which rank orthogonalises which matrix. Pure; standard library only.

ZeRO-1 cuts a flat buffer of parameters into equal shards, one a rank, wherever that cuts matrices. An update
that needs whole matrices (Muon) is therefore made by one owner a matrix: the others send it their pieces and
get them back. Owners are chosen so that ranks have equal work, whatever they hold.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Matrix:
    """One matrix in the flat shards of a group of ranks."""

    rows: int
    cols: int
    pieces: tuple[tuple[int, int], ...]
    """(rank in the group, number of elements) of each piece, in the matrix's order."""

    @property
    def size(self) -> int:
        """Number of elements."""
        return self.rows * self.cols


@dataclass(frozen=True, slots=True)
class ExchangeRound:
    """What every rank of the group owns in one round of the exchange."""

    owned: tuple[tuple[int, ...], ...]
    """[rank] -> numbers of its matrices."""


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

    With m <= n the sizes of the matrix: XXᵀ and BX take 2m²n each, A² takes 2m³.
    """
    m, n = min(rows, cols), max(rows, cols)
    return steps * (4 * m * m * n + 2 * m * m * m)


def plan_owners(
    matrices: Sequence[Matrix], num_ranks: int, steps: int, busy: Sequence[int] = ()
) -> tuple[list[int], list[int]]:
    """The owner of each matrix, and the FLOPs that each rank ends up with.

    The costliest matrix goes first, to the rank that holds the most of it of those that stay within an equal
    share of the work, and if there is none to the rank with the least work so far. So no rank has more than
    an equal share and one matrix, and what need not move stays.

    Args:
        busy: FLOPs that ranks have already.
    """
    work = list(busy) or [0] * num_ranks
    costs = [newton_schulz_flops(matrix.rows, matrix.cols, steps) for matrix in matrices]
    share = (sum(costs) + sum(work)) / num_ranks
    owners = [0] * len(matrices)
    for index in sorted(range(len(matrices)), key=lambda index: (-costs[index], index)):
        held = dict(matrices[index].pieces)
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
    """Rounds in which no owner has more than `max_elements` in hand, or a single matrix that is larger.

    An owner's matrices of one shape are neighbours, so that they can be worked on as a batch.
    """
    queues: list[list[int]] = [[] for _ in range(num_ranks)]
    by_shape = sorted(range(len(matrices)), key=lambda i: (-matrices[i].size, matrices[i].rows, i))
    for index in reversed(by_shape):
        queues[owners[index]].append(index)
    while any(queues):
        yield ExchangeRound(tuple(tuple(_take(queue, matrices, max_elements)) for queue in queues))


def _take(queue: list[int], matrices: Sequence[Matrix], max_elements: int) -> list[int]:
    """The next matrices of an owner, from the end of its queue."""
    taken: list[int] = []
    room = max_elements
    while queue and (not taken or matrices[queue[-1]].size <= room):
        taken.append(queue.pop())
        room -= matrices[taken[-1]].size
    return taken
