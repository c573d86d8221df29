"""Shares of what replicas hold alike: every element in one, evenly."""

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from parallel.reshard.replicas import share_out


@given(st.lists(st.integers(0, 20), max_size=6), st.integers(1, 7), st.integers(1, 5))
def test_every_element_is_in_one_share(numels: list[int], num_replicas: int, multiple: int) -> None:
    shares = share_out(np.array(numels, dtype=np.int64), num_replicas, multiple=multiple)

    found = [
        (int(item), at)
        for item, start, stop in zip(shares.item, shares.start, shares.stop, strict=True)
        for at in range(start, stop)
    ]
    assert found == [(item, at) for item, numel in enumerate(numels) for at in range(numel)]
    assert (shares.stop > shares.start).all()
    counts = [sum((each := shares.of(replica)).stop - each.start) for replica in range(num_replicas)]
    assert max(counts) - min(counts) <= 2 * multiple
    # Few items are cut.
    assert len(shares.item) <= sum(numel > 0 for numel in numels) + num_replicas - 1
