"""The losses of a chain of stages over all their tokens, with the needles that were found."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from k25_train.metrics.plots import EVAL_LINES, GRID_COLOR, SMOOTHED_SHARE, TEXT_COLOR, TRAIN_COLOR, style
from k25_train.metrics.sinks import Row, number

NEEDLE_COLORS = ("#0f766e", "#7c3aed", "#be185d", "#4b5563")
"""Of lengths, the shortest first."""
TEXT, REAL_TEXT = "eval_text_loss", "eval_loss/text"
"""Held-out loss of the source `text`, drawn in place of that of all text where a stage has it: facts and
lists are text, too."""
_BORDER_COLOR = "#9ca3af"


class StageRows(NamedTuple):
    """A stage and its metrics."""

    name: str
    rows: Sequence[Row]


def plot_chain(
    stages: Sequence[StageRows], needles: Mapping[str, Mapping[int, float]], path: Path, title: str
) -> None:
    """Draw training and held-out losses over the tokens of all stages into a PNG file.

    Args:
        stages: in order.
        needles: stage -> length of documents -> share of needles found at its end; may be empty.
        path: of the picture; an existing one is replaced.
        title: printed above the plot.
    """
    figure = Figure(figsize=(11, 6.2 if needles else 4.8), dpi=150, layout="constrained")
    if needles:
        axes, below = figure.subplots(2, 1, sharex=True, height_ratios=(3, 1))
    else:
        axes, below = figure.subplots(), None
    ends: dict[str, float] = {}
    start = 0.0
    for number_of, stage in enumerate(stages):
        end = _draw_stage(axes, stage, start, is_first=number_of == 0)
        _name_stage(axes, stage.name, start, end, number_of)
        ends[stage.name] = start = end
    for name, border in ends.items():
        for each in (axes, below):
            if each is not None and name != stages[-1].name:
                each.axvline(border, color=_BORDER_COLOR, linewidth=0.8, linestyle=(0, (4, 3)), zorder=0)
    style(axes, title)
    axes.legend(frameon=False, labelcolor=TEXT_COLOR, ncols=3, loc="lower right", bbox_to_anchor=(1.0, 0.99))
    _count_in_thousands(axes)
    if below is not None:
        _draw_needles(below, needles, ends)
        axes.set_xlabel("")
    (below or axes).set_xlabel("tokens, thousands", color=TEXT_COLOR)
    figure.savefig(path)


def _draw_stage(axes: Axes, stage: StageRows, start: float, *, is_first: bool) -> float:
    """Draw the losses of one stage from `start` tokens on; returns where it ends."""
    after: dict[int, float] = {0: start}
    for row in stage.rows:
        step = round(number(row["step"]))
        if "tokens" in row:
            after[step] = after.get(step - 1, start) + number(row["tokens"])
    trained = [row for row in stage.rows if "loss" in row]
    places = [after[round(number(row["step"]))] for row in trained]
    losses = [number(row["loss"]) for row in trained]
    window = max(1, round(2 * SMOOTHED_SHARE * len(losses)))
    means = [sum(losses[max(0, i - window + 1) : i + 1]) / min(i + 1, window) for i in range(len(losses))]
    axes.plot(places, losses, color=TRAIN_COLOR, alpha=0.25, linewidth=0.8)
    axes.plot(places, means, color=TRAIN_COLOR, linewidth=1.6, label="training" if is_first else None)
    drawn = {text.get_label() for text in axes.get_lines()}
    for name, (label, color) in EVAL_LINES.items():
        key = text_key(stage.rows) if name == TEXT else name
        rows = [row for row in stage.rows if key in row]
        if rows:
            axes.plot(
                [after[round(number(row["step"]))] for row in rows],
                [number(row[key]) for row in rows],
                color=color,
                linewidth=1.6,
                marker="o",
                markersize=4,
                label=label if label not in drawn else None,
            )
    return max(after.values())


def text_key(rows: Sequence[Row]) -> str:
    """The held-out loss that tells of real text in the rows of a run; those of sources that were made for the
    chain would hide it."""
    by_source = any(key.startswith("eval_loss/") for row in rows for key in row)
    return REAL_TEXT if by_source else TEXT


def _name_stage(axes: Axes, name: str, start: float, end: float, position: int) -> None:
    """Write a stage's name above its part; neighbours on two lines, since some parts are narrow."""
    axes.annotate(
        name,
        ((start + end) / 2, 1.0),
        xycoords=("data", "axes fraction"),
        xytext=(0, -4 - 12 * (position % 2)),
        textcoords="offset points",
        ha="center",
        va="top",
        fontsize=9,
        color=TEXT_COLOR,
    )


def _draw_needles(axes: Axes, needles: Mapping[str, Mapping[int, float]], ends: Mapping[str, float]) -> None:
    """The share of needles found behind stages."""
    lengths = sorted({length for found in needles.values() for length in found})
    for length, color in zip(lengths, NEEDLE_COLORS, strict=False):
        stages = [name for name, found in needles.items() if length in found]
        shares = [100 * needles[name][length] for name in stages]
        axes.plot(
            [ends[name] for name in stages],
            shares,
            color=color,
            linewidth=1.6,
            marker="o",
            markersize=5,
            label=f"in {length:,} tokens",
        )
    style(axes, "")
    _count_in_thousands(axes)
    axes.set_ylabel("needles found, %", color=TEXT_COLOR)
    axes.set_ylim(-5, 105)
    axes.grid(color=GRID_COLOR, linewidth=0.8)


def _count_in_thousands(axes: Axes) -> None:
    axes.xaxis.set_major_formatter(lambda value, _: f"{value / 1000:,.0f}")
