"""Engines with other weights are told from those in which a router's tie fell otherwise."""

import numpy as np
import pytest

from k25_train.rl.probe_gaps import apart, gaps_of, is_flip

LENGTHS = [30, 20, 40, 10]
TOLERANCE = 1e-4
OWN = -np.random.default_rng(0).exponential(2.0, sum(LENGTHS))
STEP = np.random.default_rng(1).normal(0, 3e-6, len(OWN))
"""What a step has changed: far less than the tolerance."""
BEFORE = OWN - STEP


def split(logprobs: np.ndarray) -> list[np.ndarray]:
    return np.split(logprobs, np.cumsum(LENGTHS)[:-1])


def apart_of(logprobs: np.ndarray, before: np.ndarray = BEFORE) -> list[bool]:
    parts = split(logprobs)
    found = apart(gaps_of(parts, OWN), gaps_of(parts, before), LENGTHS, TOLERANCE)
    return [bool(each) for each in found]


def noise(size: float) -> np.ndarray:
    return np.random.default_rng(2).normal(0, size, len(OWN))


@pytest.mark.parametrize("size", [0.0, 3e-7, 2e-5], ids=["exact", "float32", "beyond the step"])
def test_an_engine_with_the_weights_agrees(size: float) -> None:
    assert apart_of(OWN + noise(size)) == [False] * 4


def test_an_engine_that_missed_a_small_step_is_apart_everywhere() -> None:
    assert float(np.abs(STEP).max()) < TOLERANCE / 5
    assert apart_of(BEFORE + noise(3e-7)) == [True] * 4
    assert not is_flip(np.ones(4, dtype=np.bool_), [False] * 4)


def test_a_first_push_has_none_before_it() -> None:
    assert apart_of(BEFORE, np.full(len(OWN), np.inf)) == [False] * 4


def test_what_is_missing_or_no_number_is_apart() -> None:
    assert apart_of(OWN[:-1]) == [True] * 4
    assert apart_of(np.where(np.arange(len(OWN)) == 35, np.nan, OWN)) == [False, True, False, False]


@pytest.mark.parametrize(
    ("are_apart", "have_images", "flips"),
    [
        ([0, 0, 0, 0], [0, 0, 0, 0], True),
        ([0, 1, 0, 0], [0, 0, 0, 0], True),
        ([0, 1, 1, 0], [0, 0, 0, 0], False),
        ([0, 1], [0, 0], False),
        # Weights of the vision tower take part in this one alone.
        ([0, 1, 0, 0], [0, 1, 0, 0], False),
        ([0, 1, 0, 0], [0, 1, 0, 1], True),
        ([0, 1, 0, 0], [1, 0, 1, 1], True),
    ],
)
def test_a_tie_shows_where_others_agree(are_apart: list[int], have_images: list[int], flips: bool) -> None:
    assert is_flip(np.array(are_apart, dtype=np.bool_), [bool(each) for each in have_images]) is flips
