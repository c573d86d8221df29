"""Windows of a source: every item once per epoch, in company and order that epoch, seed and source decide."""

import numpy as np
import pytest

from k25_train.data.mix.windows import BLOCK_ITEMS, WINDOW_ITEMS, Windows

NUM_ITEMS = 3 * WINDOW_ITEMS + 5 * BLOCK_ITEMS + 7
"""Several windows, and a last block that is short."""


def windows(seed: int = 1, source: str = "web", *, shuffle: bool = True) -> Windows:
    return Windows(NUM_ITEMS, seed, source, shuffle=shuffle)


@pytest.mark.parametrize("shuffle", [True, False])
def test_an_epoch_has_every_item_once(shuffle: bool) -> None:
    of_epoch = windows(shuffle=shuffle)
    items = np.concatenate([of_epoch.items(2, number) for number in range(of_epoch.num_windows)])
    assert np.array_equal(np.sort(items), np.arange(NUM_ITEMS))
    assert np.array_equal(items, np.arange(NUM_ITEMS)) != shuffle


def test_other_blocks_meet_in_another_epoch() -> None:
    """Not just the same ones in another order."""
    first, second = (set((windows().items(epoch, 0) // BLOCK_ITEMS).tolist()) for epoch in (0, 1))
    # At random a third of the blocks of one are in the other, too.
    assert len(first & second) < 0.6 * len(first)


@pytest.mark.parametrize("other", [windows(seed=2), windows(source="code")], ids=["seed", "source"])
def test_seeds_and_sources_are_shuffled_each_in_their_way(other: Windows) -> None:
    small = Windows(BLOCK_ITEMS, 1, "web", shuffle=True)
    same, changed = (
        Windows(BLOCK_ITEMS, *of, shuffle=True) for of in ((1, "web"), (other._seed, other._source))
    )
    assert np.array_equal(small.items(0, 0), same.items(0, 0))
    assert np.mean(small.items(0, 0) == changed.items(0, 0)) < 0.1
    assert set(windows().items(0, 0).tolist()) != set(other.items(0, 0).tolist())
