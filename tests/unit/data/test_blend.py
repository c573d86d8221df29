"""The invariants that k25_train/data/mix/blend.py lists."""

from collections.abc import Mapping
from fractions import Fraction

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from k25_train.data.mix.blend import Blend

KINDS = ("text", "caption", "ocr", "video")
FLOATS = st.lists(st.floats(1e-7, 1.0), min_size=1, max_size=4)
HUNDREDTHS = st.lists(st.integers(1, 60).map(lambda unit: unit / 100), min_size=1, max_size=4)
SMOKE = {"text": 0.6, "caption": 0.25, "ocr": 0.05, "video": 0.1}


def exact_shares(shares: Mapping[str, float]) -> dict[str, Fraction]:
    total = sum(Fraction(str(share)) for share in shares.values())
    return {kind: Fraction(str(share)) / total for kind, share in shares.items()}


def assert_follows(shares: Mapping[str, float], num_sequences: int) -> None:
    """Every prefix follows the shares within one sequence, and every kind counts on."""
    blend, exact = Blend(shares), exact_shares(shares)
    counts = dict.fromkeys(shares, 0)
    for number in range(num_sequences):
        kind, position = blend.locate(number)
        assert position == counts[kind], "a sequence of this kind was left out or repeated"
        counts[kind] += 1
        for other, share in exact.items():
            assert abs(counts[other] - (number + 1) * share) < 1 + Fraction(1, 10**9)


@settings(max_examples=20, deadline=None)
@given(weights=st.one_of(FLOATS, HUNDREDTHS))
def test_every_prefix_follows_the_shares_within_one_sequence(weights: list[float]) -> None:
    assert_follows(dict(zip(KINDS, weights, strict=False)), 800)


@pytest.mark.parametrize("small", [1e-5, 3e-5, 0.00015, 1 / 3, 0.123456789])
@pytest.mark.parametrize("far", [0, 10**9, 10**15])
def test_small_and_odd_shares_are_exact_over_a_long_run(small: float, far: int) -> None:
    shares = {"video": small, "text": 1 - small}
    blend, share = Blend(shares), exact_shares(shares)["video"]
    num_sequences = 1_000_000

    def count(number: int) -> int:
        """Sequences of the rare kind before this one: its place in the stream leaves them."""
        kind, position = blend.locate(number)
        return position if kind == "video" else number - position

    for number in (far, far + num_sequences):
        assert abs(count(number) - number * share) <= 1
    assert abs(count(far + num_sequences) - count(far) - num_sequences * share) <= 2


def test_four_kinds_of_odd_shares_far_into_the_stream() -> None:
    assert_follows({"text": 0.70001, "caption": 0.29979, "ocr": 0.00013, "video": 0.00007}, 15_000)


def test_shares_hold_exactly_over_a_period_and_far_into_the_stream() -> None:
    blend = Blend({"text": 0.4, "caption": 0.4, "ocr": 0.1, "video": 0.1})

    kinds = [blend.locate(number)[0] for number in range(10**9, 10**9 + 10)]

    assert {kind: kinds.count(kind) for kind in KINDS} == {"text": 4, "caption": 4, "ocr": 1, "video": 1}
    assert blend.locate(10**9 + 10) == (kinds[0], blend.locate(10**9)[1] + kinds.count(kinds[0]))


def test_order_of_the_smoke_set_s_blend_is_as_it_was() -> None:
    order = "".join(Blend(SMOKE).locate(number)[0][0] for number in range(40))

    assert order == "tcttcttvtcttctottctvtcttcttvtcttctottctv"


def test_order_of_the_keys_does_not_matter() -> None:
    for share in (0.7, 0.70001):
        one, other = (
            Blend(dict(pairs))
            for pairs in (
                (("text", share), ("video", 1 - share)),
                (("video", 1 - share), ("text", share)),
            )
        )
        assert [one.locate(n) for n in range(100)] == [other.locate(n) for n in range(100)]


def test_single_kind_is_the_whole_stream() -> None:
    assert [Blend({"caption": 1.0}).locate(n) for n in (0, 1, 77)] == [
        ("caption", 0),
        ("caption", 1),
        ("caption", 77),
    ]
