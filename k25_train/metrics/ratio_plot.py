"""Held-out losses of runs that differ in when images come in."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from matplotlib.figure import Figure

from k25_train.metrics.plots import style
from k25_train.metrics.sinks import Row, number

COLORS = ("#1d6fb8", "#0f766e", "#d1600d")
PANELS = {"eval_text_loss": "held-out text", "eval_caption_loss": "held-out captions, OCR and video"}


@dataclass(frozen=True, slots=True, kw_only=True)
class Curve:
    """One run."""

    label: str
    """For the legend."""
    rows: Sequence[Row]
    """Its metrics."""
    tokens_per_step: int
    """Tokens of a step."""
    start: float
    """Tokens before its images."""


def plot_ratios(curves: Sequence[Curve], path: Path) -> None:
    """Draw the losses of text and of images over tokens into a PNG file; an existing one is replaced."""
    figure = Figure(figsize=(11, 4.5), dpi=150, layout="constrained")
    for axes, (key, title) in zip(figure.subplots(1, 2), PANELS.items(), strict=True):
        for curve, color in zip(curves, COLORS, strict=True):
            # Random weights come out alike, and would set the scale.
            rows = [row for row in curve.rows if key in row and number(row["step"]) > 0]
            places = [number(row["step"]) * curve.tokens_per_step for row in rows]
            axes.plot(
                places,
                [number(row[key]) for row in rows],
                color=color,
                linewidth=1.8,
                marker="o",
                markersize=4,
                label=curve.label,
            )
            if curve.start:
                axes.axvline(curve.start, color=color, linewidth=0.8, linestyle=(0, (4, 3)), zorder=0)
        style(axes, title)
        axes.set_xlabel("tokens, thousands", color="#374151")
        axes.xaxis.set_major_formatter(lambda value, _: f"{value / 1000:,.0f}")
    figure.savefig(path)
