"""Pointing: F1 of points, in which a pair counts by a Gaussian of its distance under the optimal matching.

Source: K2.5, section 4.4. The width of the Gaussian is not disclosed: every task gives its own.
"""

import math
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from k25_train.environments.base import ACCURACY, Verdict, scored
from k25_train.rl.rewards.rules.boxes import check_number
from k25_train.rl.rewards.rules.matching import best_total


class Point(NamedTuple):
    """A point in any unit."""

    x: float
    y: float


def point_f1(found: Sequence[Point], expected: Sequence[Point], sigma: float) -> Verdict:
    """2 · Σ exp(-d² / 2σ²) of matched pairs / (points found + expected); 1 if there are none of both.

    Args:
        found: finite.
        expected: finite.
        sigma: σ, above 0, in the unit of the points: the distance at which a pair counts 0.61.

    Raises ResponseFaultError for more points than are judged.
    """
    check_number(len(found), "points")
    if not found and not expected:
        return scored(1.0, {ACCURACY: 1.0, "matched": 0.0})
    found_F2 = np.array(sorted(found), dtype=np.float64).reshape(-1, 2)
    expected_E2 = np.array(sorted(expected), dtype=np.float64).reshape(-1, 2)
    # Divided first: squares of small numbers would underflow.
    apart_FE2 = (found_F2[:, None] - expected_E2[None]) / (math.sqrt(2) * sigma)
    with np.errstate(over="ignore", under="ignore"):
        matched = best_total(np.exp(-(apart_FE2**2).sum(axis=2)))
    f1 = 2 * matched / (len(found) + len(expected))
    return scored(f1, {ACCURACY: f1, "matched": matched})
