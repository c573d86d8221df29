"""Every rule against a reference that goes another way, on random cases and in any order."""

import math
import random
from fractions import Fraction

import numpy as np
import pytest

from k25_train.rl.rewards.rules import answers, boxes, counting, edit_distance, matching, points, polygons
from k25_train.rl.rewards.rules.boxes import Box
from k25_train.rl.rewards.rules.points import Point
from tests.helpers import reward_references as references

CASES = 1_000
EXACT = 1e-9


def test_best_total_is_the_best_of_all_matchings() -> None:
    rng = np.random.default_rng(1)
    for case in range(CASES):
        shape = rng.integers(0, 6, size=2)
        scores = rng.random(shape)
        if case % 3 == 1:  # Ties, and pairs of no worth.
            scores = np.round(scores * 2) / 2
        if case % 3 == 2:
            scores[scores < 0.5] = 0.0
        assert matching.best_total(scores) == pytest.approx(references.best_total(scores.tolist()), abs=EXACT)


def test_large_matchings_are_found() -> None:
    """A permutation hidden among smaller scores."""
    rng = np.random.default_rng(2)
    for size in (50, 200):
        scores = rng.random((size, size)) * 0.5
        scores[np.arange(size), rng.permutation(size)] = 0.9
        assert matching.best_total(scores) == pytest.approx(0.9 * size, abs=EXACT)


def random_boxes(rng: random.Random, most: int) -> list[Box]:
    """Boxes that often overlap; some the wrong way round, some with labels."""
    found = []
    for _ in range(rng.randint(0, most)):
        left, top = rng.uniform(0, 3), rng.uniform(0, 3)
        width, height = rng.uniform(-0.2, 3), rng.uniform(-0.2, 3)
        found.append(Box(left, top, left + width, top + height, rng.choice(["", "", "cat"])))
    return found


def test_box_f1() -> None:
    rng = random.Random(3)
    for _ in range(CASES):
        found, expected = random_boxes(rng, 5), random_boxes(rng, 5)
        if expected and rng.random() < 0.5:
            found = found[:3] + [box._replace(right=box.right + 0.1) for box in expected[:2]]
        floor = rng.choice([0.0, 0.3, 0.5])
        verdict = boxes.box_f1(found, expected, floor)
        assert verdict.reward == pytest.approx(references.box_f1(found, expected, floor), abs=EXACT)
        assert boxes.box_f1(rng.sample(found, len(found)), expected[::-1], floor).reward == verdict.reward


def test_point_f1() -> None:
    rng = random.Random(4)
    for _ in range(CASES):
        found, expected = (
            [Point(rng.random(), rng.random()) for _ in range(rng.randint(0, 5))] for _ in range(2)
        )
        sigma = rng.choice([0.01, 0.1, 1.0])
        verdict = points.point_f1(found, expected, sigma)
        assert verdict.reward == pytest.approx(references.point_f1(found, expected, sigma), abs=EXACT)
        assert points.point_f1(rng.sample(found, len(found)), expected[::-1], sigma).reward == verdict.reward


def random_polygons(rng: random.Random, most: int) -> list[list[tuple[float, float]]]:
    """Polygons of up to six vertices, many of which cross themselves."""
    return [
        [(rng.random(), rng.random()) for _ in range(rng.randint(3, 6))] for _ in range(rng.randint(0, most))
    ]


def check_rasters(cases: int, grid: int, seed: int) -> None:
    """Compare with the reference cell by cell, in the other order and the other way round, too."""
    rng = random.Random(seed)
    for _ in range(cases):
        found, expected = random_polygons(rng, 2), random_polygons(rng, 2)
        verdict = polygons.polygon_iou(found, expected, grid)
        assert verdict.reward == pytest.approx(references.raster_iou(found, expected, grid), abs=EXACT)
        turned = [polygon[::-1] for polygon in found[::-1]]
        assert polygons.polygon_iou(turned, expected, grid).reward == verdict.reward


def test_polygon_iou_cell_by_cell() -> None:
    check_rasters(100, 6, seed=5)


@pytest.mark.slow
def test_polygon_iou_cell_by_cell_in_a_thousand_cases() -> None:
    check_rasters(CASES, 12, seed=6)


def test_polygon_iou_is_near_the_very_areas() -> None:
    rng = random.Random(7)
    for _ in range(CASES // 10):
        shapes = []
        for _ in range(2):
            x, y, radius = rng.uniform(0, 1), rng.uniform(0, 1), rng.uniform(0.5, 1)
            angles = sorted(rng.uniform(0, 2 * math.pi) for _ in range(rng.randint(3, 9)))
            shapes.append([(x + radius * math.cos(a), y + radius * math.sin(a)) for a in angles])
        exact = references.convex_iou(*shapes)
        assert polygons.polygon_iou(shapes[:1], shapes[1:]).reward == pytest.approx(exact, abs=0.02)


def test_polygons_through_the_centres_of_cells() -> None:
    """Whole numbers: outlines and vertices lie on centres, which then belong to one side by rule."""
    rng = random.Random(12)
    frame = [(0, 0), (8, 0), (8, 8), (0, 8)]
    for _ in range(100):
        found = [[(rng.randint(0, 8), rng.randint(0, 8)) for _ in range(rng.randint(3, 5))]]
        verdict = polygons.polygon_iou(found, [frame], 4)
        assert verdict.reward == references.raster_iou(found, [frame], 4)


def test_polygons_on_the_grid_itself() -> None:
    """Edges through the very centres of cells, where a cell is in one of two neighbours and never in both."""
    left, right = [(0, 0), (1, 0), (1, 4), (0, 4)], [(1, 0), (4, 0), (4, 4), (1, 4)]
    whole = [(0, 0), (4, 0), (4, 4), (0, 4)]
    for grid in (2, 4, 6, 64):
        assert polygons.polygon_iou([left, right], [whole], grid).reward == 1.0
        assert polygons.polygon_iou([left], [right], grid).reward == 0.0
        share = polygons.polygon_iou([left], [whole], grid).reward
        assert share + polygons.polygon_iou([right], [whole], grid).reward == pytest.approx(1.0)


def test_edit_distance() -> None:
    rng = random.Random(8)
    for _ in range(CASES):
        one, other = ("".join(rng.choices("abé語", k=rng.randint(0, 14))) for _ in range(2))
        if rng.random() < 0.5:
            other = one[:5] + other[:2] + one[7:]
        assert edit_distance.edit_distance(one, other) == references.edit_distance(one, other)
        assert edit_distance.edit_distance(other, one) == references.edit_distance(one, other)


def test_long_edit_distances_carry_over_every_bit() -> None:
    rng = random.Random(9)
    one = "".join(rng.choices("abcd", k=700))
    other = list(one)
    for place in rng.sample(range(700), 40):
        other[place] = "x"
    assert edit_distance.edit_distance(one, "".join(other)) == 40
    assert edit_distance.edit_distance(one, one + "y" * 300) == 300


@pytest.mark.parametrize(
    ("found", "expected", "reward"),
    [
        ("", "", 1.0),
        ("abc", "", 0.0),
        (" a\n b ", "a b", 1.0),
        ("e\u0301", "é", 1.0),
        ("abcd", "abed", 0.75),
        ("Ab", "ab", 0.5),
    ],
)
def test_ocr_is_by_the_longer_text(found: str, expected: str, reward: float) -> None:
    assert edit_distance.ocr_similarity(found, expected).reward == reward


def test_numbers_match_within_tolerances() -> None:
    rng = random.Random(10)
    for _ in range(CASES):
        expected = Fraction(rng.randint(-5_000, 5_000), rng.choice([1, 10, 100]))
        # On the border as often as around it.
        away = rng.choice([Fraction(0), Fraction(1, 100), Fraction(1, 10), abs(expected) / 20])
        found = expected + rng.choice([-1, 1]) * away + rng.choice([0, Fraction(1, 10**12)])
        absolute, relative = rng.choice(["0", "0.01", "0.1"]), rng.choice(["0", "0.05"])
        verdict = answers.number_match(found, expected, Fraction(absolute), Fraction(relative))
        assert verdict.reward == references.numbers_match(found, expected, absolute, relative)


def test_counts_fall_straight() -> None:
    rng = random.Random(11)
    for _ in range(CASES):
        found, expected = rng.randint(-5, 30), rng.randint(0, 20)
        most = max(expected, 1)
        steps = min(abs(found - expected), most)
        verdict = counting.count_closeness(Fraction(found), expected)
        assert verdict.reward == pytest.approx((most - steps) / most, abs=EXACT)
        assert verdict.parts["difference"] == abs(found - expected)
