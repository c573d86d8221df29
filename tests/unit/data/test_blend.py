"""The invariants that k25_train/data/mix/blend.py lists, and shares of tokens whatever the padding."""

from collections.abc import Sequence

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from k25_train.data.mix.blend import DryError, Merge


class Source:
    """A feed of sequences of some tokens, told in chunks."""

    def __init__(self, number: int, tokens: Sequence[int], chunk: int) -> None:
        self.number, self.tokens, self.chunk, self.told = number, list(tokens), chunk, 0

    def more(self) -> np.ndarray | None:
        told = self.tokens[self.told : self.told + self.chunk]
        self.told += len(told)
        return np.array(told, dtype=np.int64) if told else None

    def take(self, count: int) -> np.ndarray:
        return np.full(count, self.number, dtype=np.int64)


def drawn(merge: Merge, count: int) -> list[int]:
    while merge.num_ready < count and merge.more() is not None:
        pass
    return merge.take(count).tolist()


def tokens_of(number: int, count: int, padding: float) -> list[int]:
    draw = np.random.Generator(np.random.PCG64(number))
    return (4096 * (1 - padding * draw.random(count))).astype(int).tolist()


@settings(max_examples=30, deadline=None)
@given(
    st.lists(st.floats(0.01, 1.0), min_size=1, max_size=6),
    st.lists(st.integers(1, 50), min_size=6, max_size=6),
)
def test_order_does_not_depend_on_how_far_is_looked_ahead(weights: list[float], chunks: list[int]) -> None:
    tokens = [tokens_of(number, 300, 0.5) for number in range(len(weights))]
    merges = [
        Merge(
            [Source(i, t, sizes[i]) for i, t in enumerate(tokens)], weights, [0] * len(weights), may_end=True
        )
        for sizes in (chunks, [300] * 6)
    ]

    order, other = (drawn(merge, 250) for merge in merges)

    assert order == other
    # The rest follows from what was served alone.
    served = [sum(t[: order[:100].count(i)]) for i, t in enumerate(tokens)]
    rest = Merge(
        [Source(i, t[order[:100].count(i) :], 7) for i, t in enumerate(tokens)], weights, served, may_end=True
    )
    assert drawn(rest, 150) == order[100:]


@settings(max_examples=30, deadline=None)
@given(st.lists(st.floats(0.02, 1.0), min_size=2, max_size=6))
def test_shares_of_tokens_are_off_by_a_sequence_at_most(weights: list[float]) -> None:
    tokens = [tokens_of(number, 400, number / 6) for number in range(len(weights))]
    merge = Merge([Source(i, t, 9) for i, t in enumerate(tokens)], weights, [0] * len(weights), may_end=True)
    served, position = [0] * len(weights), [0] * len(weights)

    for source in drawn(merge, 350):
        served[source] += tokens[source][position[source]]
        position[source] += 1
        clocks = [(s / w, 4096 / w) for s, w in zip(served, weights, strict=True)]
        low = max(clock - half / 2 for clock, half in clocks)
        high = min(clock + half / 2 for clock, half in clocks)
        assert low <= high + 1e-6


@pytest.mark.parametrize("ratio", [0.1, 0.3, 0.5])
def test_vision_ratio_holds_over_any_thousand_sequences(ratio: float) -> None:
    padding = [0.0, 0.05, 0.0, 0.3, 0.1]
    tokens = [tokens_of(number, 6000, each) for number, each in enumerate(padding)]
    sources = [Source(i, t, 50) for i, t in enumerate(tokens)]
    groups = [
        Merge(sources[:2], [0.7, 0.3], [0, 0], may_end=True),
        Merge(sources[2:], [0.2, 0.5, 0.3], [0, 0, 0], may_end=True),
    ]
    order = drawn(Merge(groups, [1 - ratio, ratio], [0, 0], may_end=False), 5000)

    positions = [0] * 5
    sizes = []
    for source in order:
        sizes.append((tokens[source][positions[source]], source >= 2))
        positions[source] += 1
    all_tokens = np.cumsum([0, *(size for size, _ in sizes)])
    vision = np.cumsum([0, *(size * is_vision for size, is_vision in sizes)])
    shares = (vision[1000:] - vision[:-1000]) / (all_tokens[1000:] - all_tokens[:-1000])
    assert np.abs(shares / ratio - 1).max() < 0.0101


def test_one_that_ends_leaves_its_share_to_the_others() -> None:
    tokens = [[10] * 4, [10] * 100, [10] * 100]
    merge = Merge([Source(i, t, 3) for i, t in enumerate(tokens)], [1, 1, 2], [0, 0, 0], may_end=True)

    order = drawn(merge, 64)

    assert order.count(0) == 4
    assert abs(order.count(1) - 20) <= 1
    assert len(drawn(merge, 1000)) == 204 - 64
    assert merge.more() is None


def test_a_group_that_must_not_end_is_named_when_it_would_be_due() -> None:
    tokens = [[10] * 100, [10] * 5]
    merge = Merge([Source(i, t, 3) for i, t in enumerate(tokens)], [0.5, 0.5], [0, 0], may_end=False)

    assert drawn(merge, 10).count(1) == 5
    with pytest.raises(DryError) as caught:
        drawn(merge, 5)
    assert caught.value.feed == 1
