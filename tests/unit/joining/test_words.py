"""Ranks and nodes in words."""

import pytest

from k25_train.joining.words import Member, ranges, some_of


def job(num_nodes: int, per_node: int) -> list[Member]:
    """All ranks of a job."""
    return [
        Member(rank=rank, node=rank // per_node, host=f"h{rank // per_node}")
        for rank in range(num_nodes * per_node)
    ]


@pytest.mark.parametrize(
    ("numbers", "expected"),
    [
        ([3], "3"),
        ([2, 1], "1 and 2"),
        ([1, 3, *range(5, 32)], "1, 3 and 5 to 31"),
        ([0, 1, 2], "0 to 2"),
        ([4, 4], "4"),
        (range(0, 40, 2), "0, 2, 4, 6, 8, 10, 12, 14 and 12 more"),
        (range(4096), "0 to 4095"),
    ],
)
def test_ranges(numbers: list[int], expected: str) -> None:
    assert ranges(numbers) == expected


@pytest.mark.parametrize(
    ("ranks", "expected"),
    [
        (range(8, 16), "node 1 (host h1, ranks 8-15)"),
        (range(16), "nodes 0 and 1 (hosts h0, h1)"),
        ([8], "rank 8 of node 1 (host h1)"),
        ([9, 17], "ranks 9 and 17 of nodes 1 and 2 (hosts h1, h2)"),
        ([*range(8), 9], "node 0 (host h0, ranks 0-7) and rank 9 of node 1 (host h1)"),
        (range(8, 256), "nodes 1 to 31 (hosts h1, h2, h3 and 28 more)"),
    ],
)
def test_whole_nodes_are_named_as_such(ranks: range, expected: str) -> None:
    everyone = job(32, 8)
    assert some_of([everyone[rank] for rank in ranks], everyone) == expected


def test_a_node_of_one_rank() -> None:
    everyone = job(2, 1)
    assert some_of(everyone[1:], everyone) == "node 1 (host h1, rank 1)"


def test_ranks_of_a_node_that_are_no_neighbours() -> None:
    """As some launchers place them."""
    everyone = [Member(rank=rank, node=rank % 2, host=f"h{rank % 2}") for rank in range(6)]
    assert some_of(everyone[::2], everyone) == "node 0 (host h0, ranks 0, 2 and 4)"
