"""Whole matrices reach their owners, and their updates every shard, over real ranks."""

from collections.abc import Sequence

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from tests.helpers.model_chunks import start
from tests.helpers.parallel_sizes import parallel_sizes
from tests.helpers.ranks import RankContext, run_ranks

pytestmark = pytest.mark.distributed

SHAPES = [(8, 6), (3, 50), (8, 6), (1, 7), (40, 2), (8, 6), (5, 5), (2, 2)]


class Pieces:
    """A rank's pieces of the matrices, which come and go in the order of the protocol."""

    def __init__(self, shard: Tensor, places: list[tuple[int, int] | None]) -> None:
        self.results = torch.zeros_like(shard)
        self._shard, self._places = shard, places
        self._to_send: list[list[int]] = []
        self._to_update: list[list[int]] = []

    def _of(self, tensor: Tensor, matrix: int) -> Tensor:
        place = self._places[matrix]
        assert place is not None
        return tensor[slice(*place)]

    def load_directions(self, matrices: Sequence[int]) -> None:
        self._to_send.append(list(matrices))
        assert len(self._to_send) == 1

    def directions(self, matrices: Sequence[int]) -> list[Tensor]:
        assert self._to_send.pop() == list(matrices)
        return [self._of(self._shard, matrix) for matrix in matrices]

    def load_targets(self, matrices: Sequence[int]) -> None:
        self._to_update.append(list(matrices))
        assert len(self._to_update) <= 2

    def apply(self, matrices: Sequence[int], updates: Sequence[Tensor]) -> None:
        assert self._to_update.pop(0) == list(matrices)
        for matrix, update in zip(matrices, updates, strict=True):
            self._of(self.results, matrix).add_(update)


def exchanged(
    context: RankContext, max_elements: int, wire_dtype: torch.dtype
) -> tuple[Tensor, Tensor, list[int], int]:
    """(buffer of results, buffer of expected results, matrices worked on here, elements in hand at most)."""
    from parallel.muon.exchange import MatrixExchange
    from parallel.muon.plan import Matrix, cut, plan_owners, plan_rounds

    topology = start(context, parallel_sizes(), num_layers=1)
    group, rank, num_ranks = topology.groups.dp, topology.dp_rank, topology.dp_size
    numel = sum(rows * cols for rows, cols in SHAPES)
    shard_size = -(-numel // num_ranks)
    whole = torch.randn(shard_size * num_ranks, generator=torch.Generator().manual_seed(1))
    shard = whole[rank * shard_size : (rank + 1) * shard_size]

    matrices, places, start_of = [], [], 0
    for rows, cols in SHAPES:
        matrices.append(Matrix(rows, cols, cut(start_of, rows * cols, shard_size)))
        low, high = max(start_of, rank * shard_size), min(start_of + rows * cols, (rank + 1) * shard_size)
        places.append((low - rank * shard_size, high - rank * shard_size) if low < high else None)
        start_of += rows * cols
    owners, _ = plan_owners(matrices, num_ranks, steps=5)
    rounds = list(plan_rounds(matrices, owners, num_ranks, max_elements))

    worked, in_hand = [], [0]

    def compute(batch: Tensor) -> Tensor:
        worked.extend(batch.shape[0] * [batch.shape[1:].numel()])
        in_hand.append(batch.numel())
        return batch.cumsum(dim=-1) + batch.sum(dim=-2, keepdim=True)

    pieces = Pieces(shard, places)
    exchange = MatrixExchange(matrices, rounds, group, wire_dtype=wire_dtype, device=topology.device)
    exchange.run(pieces, compute)
    results = pieces.results

    gathered = [torch.empty(shard_size) for _ in range(num_ranks)]
    dist.all_gather(gathered, results, group=group)
    expected, start_of = torch.zeros_like(whole), 0
    for rows, cols in SHAPES:
        matrix = whole[start_of : start_of + rows * cols].view(rows, cols)
        made = matrix.cumsum(dim=-1) + matrix.sum(dim=-2, keepdim=True)
        expected[start_of : start_of + rows * cols] = made.flatten()
        start_of += rows * cols
    return torch.cat(gathered), expected, worked, max(in_hand)


@pytest.mark.parametrize("max_elements", [1, 100, 10_000])
@pytest.mark.parametrize("num_ranks", [1, 2, 3, 4])
def test_every_shard_gets_the_results_of_whole_matrices(num_ranks: int, max_elements: int) -> None:
    by_rank = run_ranks(exchanged, num_ranks, max_elements, torch.float32)
    for found, expected, _, in_hand in by_rank:
        torch.testing.assert_close(found, expected, rtol=1e-6, atol=1e-6)
        assert in_hand <= max(max_elements, max(rows * cols for rows, cols in SHAPES))
    worked = sorted(size for _, _, sizes, _ in by_rank for size in sizes)
    assert worked == sorted(rows * cols for rows, cols in SHAPES), "each matrix is worked on once"


def test_the_wire_format_rounds_pieces_and_results_alone() -> None:
    for found, expected, _, _ in run_ranks(exchanged, 2, 100, torch.bfloat16):
        torch.testing.assert_close(found, expected, rtol=0.02, atol=0.05)
        assert not torch.equal(found, expected)
