"""Blocks of host memory for offloaded tensors."""

from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from parallel.activations.pool import Block, HostBudgetError, HostPool
from parallel.activations.sizes import BLOCK_BYTES

BUDGET_BLOCKS = 16


def pool_of(num_blocks: int) -> HostPool:
    return HostPool(num_blocks * BLOCK_BYTES, lambda memory: None)


def rounded(num_bytes: int) -> int:
    return -(-max(1, num_bytes) // BLOCK_BYTES) * BLOCK_BYTES


def check_accounts(pool: HostPool, held: list[Block], peak: int) -> None:
    """Blocks lie in the budget and apart, and every byte is in a block or in a gap, no two of which touch."""
    budget = BUDGET_BLOCKS * BLOCK_BYTES
    blocks = [(block.start, block.start + block.memory.nbytes, True) for block in held]
    gaps = [(gap.start, gap.end, False) for gap in pool._gaps]
    pieces = sorted(blocks + gaps)
    assert [start for start, _, _ in pieces] == [0, *(end for _, end, _ in pieces)][:-1]
    assert pieces[-1][1] == budget
    neighbours = pairwise(pieces)
    assert all(one[2] or other[2] for one, other in neighbours)
    assert pool.held_bytes == sum(end - start for start, end, _ in blocks)
    assert pool.peak_bytes == peak <= budget


@given(st.lists(st.one_of(st.integers(0, 5 * BLOCK_BYTES), st.floats(0, 1, exclude_max=True)), max_size=60))
def test_accounts(actions: list[int | float]) -> None:
    """Whole numbers are bytes to take; fractions say which of the held blocks is given back."""
    pool = pool_of(BUDGET_BLOCKS)
    held: list[Block] = []
    peak = 0
    for action in actions:
        if isinstance(action, int):
            largest = max((gap.end - gap.start for gap in pool._gaps), default=0)
            if rounded(action) > largest:
                with pytest.raises(HostBudgetError, match=f"tensor of {action} bytes"):
                    pool.take(action)
            else:
                held.append(pool.take(action))
                assert held[-1].memory.nbytes == rounded(action)
        elif held:
            pool.give(held.pop(int(action * len(held))))
        peak = max(peak, pool.held_bytes)
        check_accounts(pool, held, peak)
    for block in held:
        pool.give(block)
    assert pool.take(BUDGET_BLOCKS * BLOCK_BYTES).start == 0


def test_a_block_is_cut_from_the_smallest_gap() -> None:
    pool = pool_of(10)
    first, _, third, _ = (pool.take(blocks * BLOCK_BYTES) for blocks in (3, 1, 2, 1))
    pool.give(first)
    pool.give(third)
    assert pool.take(2 * BLOCK_BYTES).start == third.start


def test_the_peak_starts_again_from_what_is_held() -> None:
    pool = pool_of(4)
    one, other = pool.take(1), pool.take(1)
    pool.give(one)
    pool.restart_peak()
    assert pool.peak_bytes == BLOCK_BYTES
    pool.give(other)


def test_a_budget_is_whole_blocks() -> None:
    pool = HostPool(2 * BLOCK_BYTES - 1, lambda memory: None)
    with pytest.raises(HostBudgetError):
        pool.take(BLOCK_BYTES + 1)


def test_blocks_are_memory_of_their_own() -> None:
    pool = pool_of(2)
    one, other = pool.take(BLOCK_BYTES), pool.take(BLOCK_BYTES)
    one.memory.fill_(1)
    other.memory.fill_(2)
    assert one.memory.sum() == BLOCK_BYTES
    assert other.memory.sum() == 2 * BLOCK_BYTES


def test_no_memory_is_not_locked() -> None:
    def pin(memory: object) -> None:
        raise AssertionError("CUDA refuses to")

    with pytest.raises(HostBudgetError, match="largest gap has 0"):
        HostPool(0, pin).take(1)
