"""Keyed permutations: bijections, the same everywhere, without an order that shows."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from k25_train.data.mix.permutation import KeyedPermutation, key_of, shuffled


@settings(max_examples=60, deadline=None)
@given(st.integers(1, 3000), st.integers(0, 2**64 - 1))
def test_every_item_comes_once(num_items: int, key: int) -> None:
    order = KeyedPermutation(num_items, key)(np.arange(num_items))

    assert np.array_equal(np.sort(order), np.arange(num_items))
    assert np.array_equal(np.sort(shuffled(num_items, key)), np.arange(num_items))


@pytest.mark.parametrize("num_items", [2**32 - 1, 10**10 + 7, 17 * 10**9, 2**61 + 3])
def test_a_stretch_of_a_large_one_has_no_item_twice(num_items: int) -> None:
    permutation = KeyedPermutation(num_items, 3)

    items = permutation(np.arange(num_items - 20_000, num_items))

    assert len(np.unique(items)) == 20_000
    assert items.min() >= 0
    assert items.max() < num_items
    # Spread over all of it: a twentieth has some twentieth.
    share = np.bincount(items // (num_items // 20 + 1), minlength=20)
    assert share.min() > 800
    assert share.max() < 1200
    # Any part alone is found as in the whole.
    assert np.array_equal(permutation(np.array([num_items - 5])), items[-5:-4])


def test_neighbours_are_as_far_apart_as_by_chance() -> None:
    num_items = 2**16 + 11
    for key in range(4):
        order = KeyedPermutation(num_items, key)(np.arange(num_items))
        for distance in (1, 2, 256, 257):
            gaps = (order[distance:] - order[:-distance]) / num_items
            # Of two independent uniform numbers: mean 1/3, and as often above as below.
            assert abs(np.abs(gaps).mean() - 1 / 3) < 0.01
            assert abs((gaps > 0).mean() - 0.5) < 0.01
        assert abs(np.corrcoef(order, np.arange(num_items))[0, 1]) < 0.02
        assert (order == np.arange(num_items)).sum() < 8


def test_keys_and_their_parts_give_other_orders() -> None:
    keys = [
        key_of(*parts)
        for parts in ((1, "a", 0), (1, "a", 1), (2, "a", 0), (1, "b", 0), ("1", "a", 0), (1, "a0"))
    ]
    assert len(set(keys)) == len(keys)

    orders = [KeyedPermutation(5000, key)(np.arange(5000)) for key in keys]
    for one in range(len(keys)):
        for other in range(one):
            assert (orders[one] == orders[other]).sum() < 10


def test_order_is_the_same_on_every_machine() -> None:
    assert KeyedPermutation(1000, key_of(0, "text", 0, "blocks"))(np.arange(6)).tolist() == GOLDEN
    assert shuffled(6, 1).tolist() == GOLDEN_SMALL


GOLDEN = [747, 152, 137, 979, 194, 122]
GOLDEN_SMALL = [0, 5, 4, 1, 2, 3]
