"""README's picture of throughput against images is that of today's plans."""

import json
import re
from pathlib import Path

import pytest

from k25_train.compose.offer import offer
from k25_train.compose.resolve import compose
from k25_train.plan.pipeline import plan_pipeline
from k25_train.plan.variants import WhatIfKind, variants_of
from k25_train.plan.what_if import planned
from tests.bench.planner_picture import (
    DATA,
    OVERRIDES,
    PICTURE,
    Points,
    draw,
    ends,
    planned_screen,
    points_of,
    shown_screen,
)
from tests.helpers.project_sources import REPO

TOLERANCE = 0.02
REMEDY = "python -m tests.bench.planner_picture draws it again"


@pytest.fixture(scope="module")
def drawn() -> Points:
    """What was committed."""
    found = json.loads(DATA.read_text(encoding="utf-8"))
    assert tuple(found["overrides"]) == OVERRIDES
    return {name: [(x, y, fits) for x, y, fits in curve] for name, curve in found["points"].items()}


@pytest.mark.parametrize(
    "share", [0.1, *(pytest.param(n / 10, marks=pytest.mark.slow) for n in (0, 2, 3, 4, 5))]
)
def test_the_picture_is_that_of_the_plan(drawn: Points, share: float) -> None:
    pipeline, choices = plan_pipeline(compose(OVERRIDES)), offer()
    variants = [each for each in variants_of(WhatIfKind.vision, pipeline, choices) if each.value == share]
    points = points_of([planned(each, choices, seeks_remedy=False) for each in variants])
    assert list(points) == list(drawn) == ["coupled", "upfront", "bubbles"]
    for name, [(x, y, fits)] in points.items():
        [(_, old_y, old_fits)] = [point for point in drawn[name] if point[0] == x]
        assert y == pytest.approx(old_y, rel=TOLERANCE) and fits == old_fits, f"{name} {x:.0%}: {REMEDY}"


def test_the_picture_is_shown() -> None:
    assert str(PICTURE.relative_to(REPO)) in (REPO / "README.md").read_text(encoding="utf-8")


def test_the_readme_shows_the_screen() -> None:
    shown, now = shown_screen(), planned_screen()
    numbers = [float(re.search(r"([\d,]+) tokens/s", text)[1].replace(",", "")) for text in (shown, now)]  # type: ignore[index]
    assert numbers[0] == pytest.approx(numbers[1], rel=TOLERANCE), REMEDY
    assert shown.splitlines()[:2] == now.splitlines()[:2], REMEDY
    assert shown.splitlines()[-4:] == now.splitlines()[-4:], REMEDY


def test_labels_do_not_touch(drawn: Points, tmp_path: Path) -> None:
    close = {name: [(0.0, 10.0, True), (0.5, 9.0 + n / 100, n > 0)] for n, name in enumerate(drawn)}
    heights = [height for _, height, _ in ends(close, least_apart=0.5)]
    assert heights == [9.0, 9.5, 10.0]
    draw(close, tmp_path / "picture.png")
    assert (tmp_path / "picture.png").read_bytes().startswith(b"\x89PNG")
