"""A curve in one line of text."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise

BLOCKS = "▁▂▃▄▅▆▇█"
ASCII = "_.-=+*#@"
"""Where the terminal's encoding has no blocks."""


def sparkline(values: Sequence[float], width: int, encoding: str = "utf-8") -> str:
    """At most `width` characters, each the mean of as many values; higher ones are taller.

    Outliers do not flatten the rest: what is above or below the middle nine tenths of the means is drawn at
    the edge.
    """
    if not values or width < 1:
        return ""
    width = min(width, len(values))
    bounds = [round(index * len(values) / width) for index in range(width + 1)]
    parts = [values[start:end] for start, end in pairwise(bounds)]
    means = [sum(part) / len(part) for part in parts]
    ordered = sorted(means)
    cut = len(ordered) // 20
    low, high = ordered[cut], ordered[-1 - cut]
    levels = BLOCKS if encoding.lower().replace("-", "").startswith("utf") else ASCII
    return "".join(levels[_level(mean, low, high)] for mean in means)


def _level(value: float, low: float, high: float) -> int:
    if high <= low:
        return 0
    share = (value - low) / (high - low)
    return round(min(max(share, 0.0), 1.0) * (len(BLOCKS) - 1))
