"""Owners of matrices: every one once, equal work, bounded rounds."""

from hypothesis import given
from hypothesis import strategies as st

from parallel.muon.plan import Matrix, cut, newton_schulz_flops, plan_owners, plan_rounds

SHAPES = st.tuples(st.integers(1, 40), st.integers(1, 40))


def matrices_of(shapes: list[tuple[int, int]], num_ranks: int) -> list[Matrix]:
    """Matrices that follow one another in a buffer of equal shards."""
    shard_size = -(-sum(rows * cols for rows, cols in shapes) // num_ranks)
    found, start = [], 0
    for rows, cols in shapes:
        found.append(Matrix(rows, cols, cut(start, rows * cols, shard_size)))
        start += rows * cols
    return found


def test_a_range_is_cut_where_shards_end() -> None:
    assert cut(0, 10, 4) == ((0, 4), (1, 4), (2, 2))
    assert cut(6, 2, 4) == ((1, 2),)
    assert cut(3, 6, 4) == ((0, 1), (1, 4), (2, 1))


def test_flops_are_those_of_the_smaller_side() -> None:
    assert newton_schulz_flops(2, 3, 1) == newton_schulz_flops(3, 2, 1) == 4 * 4 * 3 + 2 * 8
    assert newton_schulz_flops(2, 3, 5) == 5 * newton_schulz_flops(2, 3, 1)


@given(shapes=st.lists(SHAPES, min_size=1, max_size=40), num_ranks=st.integers(1, 8))
def test_no_rank_has_more_than_its_share_and_one_matrix(
    shapes: list[tuple[int, int]], num_ranks: int
) -> None:
    matrices = matrices_of(shapes, num_ranks)
    assert all(sum(size for _, size in matrix.pieces) == matrix.size for matrix in matrices)
    owners, work = plan_owners(matrices, num_ranks, steps=5)
    costs = [newton_schulz_flops(rows, cols, 5) for rows, cols in shapes]
    assert [
        sum(c for c, o in zip(costs, owners, strict=True) if o == rank) for rank in range(num_ranks)
    ] == work
    assert max(work) <= sum(costs) / num_ranks + max(costs)


def test_a_busy_rank_gets_less() -> None:
    matrices = matrices_of([(4, 4)] * 4, 2)
    cost = newton_schulz_flops(4, 4, 5)
    assert plan_owners(matrices, 2, 5, busy=[2 * cost, 0]) == ([0, 1, 1, 1], [3 * cost, 3 * cost])


def test_a_matrix_stays_where_most_of_it_is_if_work_is_equal() -> None:
    owners, _ = plan_owners([Matrix(4, 4, ((0, 2), (1, 14)))], 2, 5)
    assert owners == [1]


@given(
    shapes=st.lists(SHAPES, min_size=1, max_size=40),
    num_ranks=st.integers(1, 5),
    max_elements=st.integers(1, 3000),
)
def test_rounds_hold_every_matrix_once_within_their_bound(
    shapes: list[tuple[int, int]], num_ranks: int, max_elements: int
) -> None:
    matrices = matrices_of(shapes, num_ranks)
    owners, _ = plan_owners(matrices, num_ranks, steps=5)
    rounds = list(plan_rounds(matrices, owners, num_ranks, max_elements))
    seen = [(rank, matrix) for each in rounds for rank, owned in enumerate(each.owned) for matrix in owned]
    assert sorted(seen) == sorted((owner, matrix) for matrix, owner in enumerate(owners))
    for each in rounds:
        for owned in each.owned:
            assert len(owned) == 1 or sum(matrices[matrix].size for matrix in owned) <= max_elements
