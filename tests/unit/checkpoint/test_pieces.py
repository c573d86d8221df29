"""Shares of what several ranks have alike."""

import pytest

from k25_train.checkpoint.pieces import share


@pytest.mark.parametrize("num_shares", [1, 2, 3, 7, 64])
@pytest.mark.parametrize("least", [1, 5, 1000])
def test_shares_are_even_and_hold_every_element_once(num_shares: int, least: int) -> None:
    sizes = [5, 0, 1, 12, 3]
    shares = [list(share(sizes, index, num_shares, least)) for index in range(num_shares)]
    for number, size in enumerate(sizes):
        ranges = sorted((start, stop) for each in shares for tensor, start, stop in each if tensor == number)
        assert [element for start, stop in ranges for element in range(start, stop)] == list(range(size))
    counts = [sum(stop - start for _, start, stop in each) for each in shares]
    most = max(-(-sum(sizes) // num_shares), least)
    # All are full but the last that has something.
    full = sum(sizes) // most
    assert counts == [most] * full + [sum(sizes) % most][: num_shares - full] + [0] * (num_shares - full - 1)
