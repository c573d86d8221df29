"""What the READMEs show of the planner: throughput of the 1T model against images, and the one screen.

    python -m tests.bench.planner_picture

The picture has a curve for each place of the vision tower: in the first pipeline stage, ahead of the
pipeline, in its bubbles. Writes tests/golden/planner_vision.json and .png, and the screen in
k25_train/plan/README.md, which a test compares with plans; prints what it plotted.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

from k25_train.compose.offer import offer
from k25_train.compose.resolve import compose
from k25_train.plan.pipeline import plan_pipeline
from k25_train.plan.report.planned import planned_of
from k25_train.plan.report.screen import screen
from k25_train.plan.variants import WhatIfKind
from k25_train.plan.what_if import Row, what_if
from tests.helpers.project_sources import REPO

OVERRIDES = ("experiment=k25_pretrain_4k",)
DATA, PICTURE = REPO / "tests/golden/planner_vision.json", REPO / "tests/golden/planner_vision.png"
README, FENCE = REPO / "k25_train/plan/README.md", "```text\n"
COLORS = {"coupled": "#b9502f", "upfront": "#1d6fb8", "bubbles": "#2f7d4e"}
Points = dict[str, list[tuple[float, float, bool]]]
"""Place of the tower -> (share of vision tokens, tokens per second and GPU, whether it fits)."""


def planned_points() -> Points:
    """What is planned now."""
    pipeline = plan_pipeline(compose(OVERRIDES))
    return points_of(what_if(WhatIfKind.vision, pipeline, offer(), seeks_remedy=False).rows)


def points_of(rows: Sequence[Row]) -> Points:
    """The points of rows that training would take."""
    points: Points = {}
    for row in rows:
        if row.step is not None:
            point = (row.variant.value, round(row.step.tokens_per_s_per_gpu, 1), row.is_possible)
            points.setdefault(row.variant.series, []).append(point)
    return points


def draw(points: Points, path: Path) -> None:
    """Draw a PNG file: filled marks fit the devices and hosts of the configuration, hollow ones do not."""
    from matplotlib.figure import Figure

    from k25_train.metrics.plots import GRID_COLOR, TEXT_COLOR

    figure = Figure(figsize=(8, 4), dpi=150, layout="constrained")
    axes = figure.subplots()
    top = max(rate for curve in points.values() for _, rate, _ in curve)
    for name, curve in points.items():
        color = COLORS[name]
        axes.plot([x for x, _, _ in curve], [y for _, y, _ in curve], color=color, linewidth=1.8)
        for x, y, fits in curve:
            axes.plot([x], [y], "o", color=color, markersize=5.5, markerfacecolor=color if fits else "white")
    for name, y, rate in ends(points, least_apart=0.065 * top):
        text = f"{name}  {rate:,.0f}"
        axes.annotate(text, (0.51, y), color=COLORS[name], va="center", annotation_clip=False)
    axes.set_ylim(0, 1.12 * top)
    axes.set_xlim(-0.01, 0.505)
    axes.xaxis.set_major_formatter(lambda x, _: f"{x:.0%}")
    axes.yaxis.set_major_formatter(lambda y, _: f"{y:,.0f}")
    axes.set_xlabel("share of vision tokens", color=TEXT_COLOR)
    axes.set_title("planned tokens/s per GPU, Kimi K2.5 on 256 H800", loc="left", color=TEXT_COLOR)
    axes.grid(axis="y", color=GRID_COLOR)
    axes.tick_params(colors=TEXT_COLOR, length=0)
    for side in ("top", "right", "left"):
        axes.spines[side].set_visible(False)
    axes.spines["bottom"].set_color(GRID_COLOR)
    if not all(fits for curve in points.values() for _, _, fits in curve):
        note = "hollow: does not fit memory"
        axes.text(0.0, 0.04 * top, note, color=TEXT_COLOR, fontsize=9)
    figure.savefig(path)


def ends(points: Points, least_apart: float) -> list[tuple[str, float, float]]:
    """(curve, height of its label, its last value), from below; labels are pushed apart where they touch."""
    found, height = [], float("-inf")
    for name, curve in sorted(points.items(), key=lambda item: item[1][-1][1]):
        height = max(curve[-1][1], height + least_apart)
        found.append((name, height, curve[-1][1]))
    return found


def shown_screen() -> str:
    """The screen that the planner's README shows."""
    text = README.read_text(encoding="utf-8")
    return text[text.index(FENCE) + len(FENCE) : text.index("```", text.index(FENCE) + len(FENCE))]


def planned_screen() -> str:
    """The screen as it is now, 80 characters wide."""
    lines = screen(planned_of(plan_pipeline(compose(OVERRIDES))), 80)
    return "".join(f"{line.plain}\n" for line in lines)


def main() -> None:
    """Plan, write, draw, print."""
    text = README.read_text(encoding="utf-8")
    text = text.replace(FENCE + shown_screen(), FENCE + planned_screen())
    README.write_text(text, encoding="utf-8")
    points = planned_points()
    DATA.write_text(json.dumps({"overrides": OVERRIDES, "points": points}, indent=1) + "\n", encoding="utf-8")
    draw(points, PICTURE)
    for name, curve in points.items():
        print(f"{name:8} " + "  ".join(f"{x:.0%} {y:,.0f}{'' if fits else '*'}" for x, y, fits in curve))
    print("* does not fit")


if __name__ == "__main__":
    main()
