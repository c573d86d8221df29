"""Counting: by how many it is off.

Source: K2.5, section 4.4 ("absolute difference"). How a difference becomes a reward is not disclosed, our
choice: 1 for the exact count, falling straight to 0 where it is off by all that there is.
"""

from fractions import Fraction

from k25_train.environments.base import ACCURACY, Verdict, scored


def count_closeness(found: Fraction, expected: int) -> Verdict:
    """1 - |found - expected| / max(expected, 1), 0 at least. `expected` is 0 or more."""
    difference = abs(found - expected)
    closeness = float(max(Fraction(0), 1 - difference / max(expected, 1)))
    return scored(closeness, {ACCURACY: closeness, "difference": float(difference)})
