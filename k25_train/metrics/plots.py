"""`loss.png`: the training loss of every step with the held-out losses on top."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from k25_train.metrics.sinks import Row, is_finite, number

TRAIN_COLOR = "#4b5563"
EVAL_LINES = {
    "eval_text_loss": ("held-out text", "#1d6fb8"),
    "eval_caption_loss": ("held-out captions", "#d1600d"),
}
GRID_COLOR = "#e5e7eb"
TEXT_COLOR = "#374151"
SMOOTHED_SHARE = 0.03
"""Share of the run over which the smooth line averages."""


def plot_losses(rows: Sequence[Row], path: Path, title: str) -> None:
    """Draw training and held-out losses over steps into a PNG file.

    Args:
        rows: as `sinks.read_rows` gives them; rows may have a training loss, held-out losses or both.
        path: of the picture; an existing one is replaced.
        title: printed above the plot.
    """
    figure = Figure(figsize=(8, 4.5), dpi=150, layout="constrained")
    axes = figure.subplots()
    ends = draw_training(axes, [row for row in rows if "loss" in row])
    for key, (label, color) in EVAL_LINES.items():
        ends += draw_evaluations(axes, [row for row in rows if key in row], key, label, color)
    label_ends(axes, ends)
    style(axes, title)
    figure.savefig(path)


Ends = list[tuple[float, float, str]]
"""(step, loss, colour) of the right end of each line."""


def draw_training(axes: Axes, rows: Sequence[Row]) -> Ends:
    """The loss of each step, faint, and its running mean."""
    if not rows:
        return []
    steps = [number(row["step"]) for row in rows]
    losses = [number(row["loss"]) for row in rows]
    window = max(1, round(SMOOTHED_SHARE * len(losses)))
    means = [sum(losses[max(0, i - window + 1) : i + 1]) / min(i + 1, window) for i in range(len(losses))]
    axes.plot(steps, losses, color=TRAIN_COLOR, alpha=0.25, linewidth=0.8)
    axes.plot(steps, means, color=TRAIN_COLOR, linewidth=1.8, label="training")
    return [(steps[-1], means[-1], TRAIN_COLOR)]


def draw_evaluations(axes: Axes, rows: Sequence[Row], key: str, label: str, color: str) -> Ends:
    """One held-out loss, a marker an evaluation."""
    if not rows:
        return []
    steps = [number(row["step"]) for row in rows]
    losses = [number(row[key]) for row in rows]
    axes.plot(steps, losses, color=color, linewidth=1.8, marker="o", markersize=4.5, label=label)
    return [(steps[-1], losses[-1], color)]


def label_ends(axes: Axes, ends: Ends) -> None:
    """Write each line's last value next to its end, pushed apart where values are close."""
    low, high = axes.get_ylim()
    height = 0.045 * (high - low)
    lowest = low - height
    finite = [end for end in ends if is_finite(end[1])]
    for step, loss, color in sorted(finite, key=lambda end: end[1]):
        lowest = max(loss, lowest + height)
        axes.annotate(
            f"{loss:.2f}",
            (step, lowest),
            xytext=(8, 0),
            textcoords="offset points",
            va="center",
            color=color,
            fontsize=10,
            fontweight="bold",
            annotation_clip=False,
        )


def style(axes: Axes, title: str) -> None:
    """Axes, grid, title and legend."""
    axes.set_title(title, loc="left", fontsize=12, fontweight="bold", color=TEXT_COLOR)
    axes.set_xlabel("step", color=TEXT_COLOR)
    axes.set_ylabel("loss (nats per token)", color=TEXT_COLOR)
    axes.xaxis.set_major_locator(MaxNLocator(integer=True, steps=[1, 2, 5, 10]))
    axes.margins(x=0.02)
    axes.grid(color=GRID_COLOR, linewidth=0.8)
    axes.set_axisbelow(True)
    axes.tick_params(colors=TEXT_COLOR, length=0)
    for side in ("top", "right", "left"):
        axes.spines[side].set_visible(False)
    axes.spines["bottom"].set_color(GRID_COLOR)
    if axes.get_legend_handles_labels()[0]:
        axes.legend(frameon=False, labelcolor=TEXT_COLOR)
