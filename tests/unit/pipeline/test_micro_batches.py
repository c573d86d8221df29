"""Groups of micro-batches are those that megatron-core's interleaved schedule takes, and the smallest."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from parallel.pipeline.micro_batches import micro_batch_group_size


def is_legal(group: int, num_micro_batches: int, pp: int) -> bool:
    """megatron-core's two checks at the start of its interleaved schedule."""
    if group > num_micro_batches or group < pp:
        return False
    return not 0 < num_micro_batches % group < pp


@given(st.integers(2, 16), st.integers(0, 80))
def test_the_group_is_the_smallest_legal_one(pp: int, more: int) -> None:
    num_micro_batches = pp + more
    group = micro_batch_group_size(num_micro_batches, pp)
    assert is_legal(group, num_micro_batches, pp)
    assert not any(is_legal(smaller, num_micro_batches, pp) for smaller in range(group))


@pytest.mark.parametrize(
    ("num_micro_batches", "pp", "group"),
    [(8, 2, 2), (64, 16, 16), (3, 2, 3), (5, 2, 3), (5, 4, 5), (11, 4, 6), (17, 16, 17), (33, 16, 17)],
)
def test_groups_of_some_sizes(num_micro_batches: int, pp: int, group: int) -> None:
    assert micro_batch_group_size(num_micro_batches, pp) == group


def test_fewer_micro_batches_than_ranks_are_refused() -> None:
    with pytest.raises(ValueError, match="3 micro-batches do not fill an interleaved pipeline of 4 ranks"):
        micro_batch_group_size(3, 4)
