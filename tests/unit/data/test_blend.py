"""The invariants that k25_train/data/mix/blend.py lists."""

from hypothesis import given, settings
from hypothesis import strategies as st

from k25_train.data.mix.blend import RESOLUTION, Blend

KINDS = ("text", "caption", "ocr", "video")
share_lists = st.lists(st.floats(0.001, 1.0), min_size=1, max_size=4)


@settings(max_examples=15, deadline=None)
@given(share_lists)
def test_every_prefix_follows_the_shares_within_one_sequence(weights: list[float]) -> None:
    shares = {kind: weight / sum(weights) for kind, weight in zip(KINDS, weights, strict=False)}
    blend = Blend(shares)

    counts = dict.fromkeys(shares, 0)
    rounding = 1 / RESOLUTION
    for number in range(2500):
        kind, position = blend.locate(number)
        assert position == counts[kind], "a sequence of this kind was left out or repeated"
        counts[kind] += 1
        for other, share in shares.items():
            allowed = 1 + (number + 1) * rounding
            assert abs(counts[other] - (number + 1) * share) < allowed


def test_shares_hold_exactly_over_a_period_and_far_into_the_stream() -> None:
    blend = Blend({"text": 0.4, "caption": 0.4, "ocr": 0.1, "video": 0.1})

    kinds = [blend.locate(number)[0] for number in range(10**9, 10**9 + 10)]

    assert {kind: kinds.count(kind) for kind in KINDS} == {"text": 4, "caption": 4, "ocr": 1, "video": 1}
    assert blend.locate(10**9 + 10) == (kinds[0], blend.locate(10**9)[1] + kinds.count(kinds[0]))


def test_order_of_the_keys_does_not_matter() -> None:
    one, other = Blend({"text": 0.7, "video": 0.3}), Blend({"video": 0.3, "text": 0.7})

    assert [one.locate(n) for n in range(100)] == [other.locate(n) for n in range(100)]


def test_single_kind_is_the_whole_stream() -> None:
    assert [Blend({"caption": 1.0}).locate(n) for n in (0, 1, 77)] == [
        ("caption", 0),
        ("caption", 1),
        ("caption", 77),
    ]
