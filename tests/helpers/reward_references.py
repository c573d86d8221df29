"""The rules of `k25_train/rl/rewards` once more: plain, slow, and by other ways."""

import itertools
import math
from collections.abc import Sequence
from decimal import Decimal, getcontext
from fractions import Fraction
from functools import cache

from k25_train.rl.rewards.rules.boxes import Box
from k25_train.rl.rewards.rules.points import Point


def best_total(scores: Sequence[Sequence[float]]) -> float:
    """Largest total of a matching, by trying all."""
    if not scores or not scores[0]:
        return 0.0
    if len(scores) > len(scores[0]):
        scores = list(zip(*scores, strict=True))
    return max(
        math.fsum(row[column] for row, column in zip(scores, columns, strict=True))
        for columns in itertools.permutations(range(len(scores[0])), len(scores))
    )


def iou(one: Box, other: Box) -> float:
    """Of two boxes, in exact arithmetic."""
    if one.label != other.label:
        return 0.0

    def area(left: float, top: float, right: float, bottom: float) -> Fraction:
        width, height = Fraction(right) - Fraction(left), Fraction(bottom) - Fraction(top)
        return width * height if width > 0 and height > 0 else Fraction(0)

    shared = area(
        max(one.left, other.left),
        max(one.top, other.top),
        min(one.right, other.right),
        min(one.bottom, other.bottom),
    )
    union = area(*one[:4]) + area(*other[:4]) - shared
    return float(shared / union) if union else 0.0


def box_f1(found: Sequence[Box], expected: Sequence[Box], floor: float) -> float:
    """F1 with every matching tried."""
    if not found and not expected:
        return 1.0
    scores = [[value if (value := iou(a, b)) >= floor else 0.0 for b in expected] for a in found]
    return 2 * best_total(scores) / (len(found) + len(expected))


def point_f1(found: Sequence[Point], expected: Sequence[Point], sigma: float) -> float:
    """F1 with every matching tried."""
    if not found and not expected:
        return 1.0
    scores = [[math.exp(-(math.dist(a, b) ** 2) / (2 * sigma**2)) for b in expected] for a in found]
    return 2 * best_total(scores) / (len(found) + len(expected))


def raster_iou(
    found: Sequence[Sequence[tuple[float, float]]],
    expected: Sequence[Sequence[tuple[float, float]]],
    grid: int,
) -> float:
    """Cell by cell on the same grid, each by a ray to its right, in exact arithmetic."""
    if not found and not expected:
        return 1.0
    corners = [vertex for polygon in (*found, *expected) for vertex in polygon]
    low = [min(vertex[axis] for vertex in corners) for axis in (0, 1)]
    high = [max(vertex[axis] for vertex in corners) for axis in (0, 1)]
    both = either = 0
    for row, column in itertools.product(range(grid), range(grid)):
        x, y = (
            low[axis] + (number + 0.5) / grid * (high[axis] - low[axis])
            for axis, number in ((0, column), (1, row))
        )
        ours, theirs = (any(_inside(x, y, polygon) for polygon in side) for side in (found, expected))
        both += ours and theirs
        either += ours or theirs
    return both / either if either else 0.0


def _inside(x: float, y: float, polygon: Sequence[tuple[float, float]]) -> bool:
    odd = False
    for (x1, y1), (x2, y2) in zip(polygon, (*polygon[1:], polygon[0]), strict=True):
        if (y1 <= y) != (y2 <= y):
            at = Fraction(x1) + (Fraction(y) - Fraction(y1)) * (Fraction(x2) - Fraction(x1)) / (
                Fraction(y2) - Fraction(y1)
            )
            odd ^= at > Fraction(x)
    return odd


def convex_iou(one: Sequence[tuple[float, float]], other: Sequence[tuple[float, float]]) -> float:
    """Of two convex polygons, counterclockwise: exact, by cutting one along each edge of the other."""
    cut = list(one)
    for (x1, y1), (x2, y2) in zip(other, (*other[1:], other[0]), strict=True):

        def side(
            point: tuple[float, float], a: float = x1, b: float = y1, c: float = x2, d: float = y2
        ) -> float:
            return (c - a) * (point[1] - b) - (d - b) * (point[0] - a)

        kept = []
        for here, after in zip(cut, (*cut[1:], *cut[:1]), strict=True):
            if side(here) >= 0:
                kept.append(here)
            if (side(here) >= 0) != (side(after) >= 0):
                share = side(here) / (side(here) - side(after))
                kept.append((here[0] + share * (after[0] - here[0]), here[1] + share * (after[1] - here[1])))
        cut = kept
    shared = _area(cut)
    return shared / (_area(one) + _area(other) - shared)


def _area(polygon: Sequence[tuple[float, float]]) -> float:
    after = (*polygon[1:], *polygon[:1])
    return sum(x1 * y2 - x2 * y1 for (x1, y1), (x2, y2) in zip(polygon, after, strict=True)) / 2


def edit_distance(one: str, other: str) -> int:
    """By its definition, with what was found remembered."""

    @cache
    def from_here(a: int, b: int) -> int:
        if a == len(one) or b == len(other):
            return len(one) - a + len(other) - b
        if one[a] == other[b]:
            return from_here(a + 1, b + 1)
        return 1 + min(from_here(a + 1, b), from_here(a, b + 1), from_here(a + 1, b + 1))

    return from_here(0, 0)


def numbers_match(found: Fraction, expected: Fraction, absolute: str, relative: str) -> bool:
    """In decimals of 200 places, which hold every number here."""
    getcontext().prec = 200
    one, other = (Decimal(value.numerator) / Decimal(value.denominator) for value in (found, expected))
    return abs(one - other) <= Decimal(absolute) or abs(one - other) <= Decimal(relative) * abs(other)
