"""Runs in one picture: a panel for each kind of figure, a colour for each run."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import cycle
from pathlib import Path
from typing import Literal

from matplotlib import colormaps
from matplotlib.axes import Axes
from matplotlib.colors import to_hex
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import AutoLocator, EngFormatter

from k25_train.metrics.compare.runs import Axis, ComparedRun
from k25_train.metrics.plots import GRID_COLOR, SMOOTHED_SHARE, TEXT_COLOR, style

Dash = Literal["-", "--", ":", "-."]
LINES: tuple[Dash, ...] = ("-", "--", ":", "-.")
BORDER_COLOR = "#6b7280"
_LABELS = {Axis.step: "step", Axis.tokens: "tokens", Axis.hours: "hours in steps"}


@dataclass(frozen=True, slots=True)
class Panel:
    """One diagram."""

    title: str
    unit: str
    keys: tuple[str, ...]
    """Figures; one that ends in `/` stands for all that begin so."""
    is_smoothed: bool = False
    """Whether a running mean is drawn over the faint values."""
    is_log: bool = False


PANELS = (
    Panel("training loss", "nats per token", ("loss",), is_smoothed=True),
    Panel("held-out losses", "nats per token", ("eval_text_loss", "eval_caption_loss")),
    Panel(
        "gradient norms", "norm before clipping", ("grad_norm/", "grad_norm"), is_smoothed=True, is_log=True
    ),
    Panel("weight norms", "norm", ("weight_norm/",)),
    Panel("expert load", "max / mean", ("expert_load",), is_smoothed=True),
    Panel("throughput", "tokens/s", ("tokens_per_s",), is_smoothed=True),
)


def plot_runs(runs: Sequence[ComparedRun], path: Path, axis: Axis) -> None:
    """Draw the runs into a PNG file; an existing one is replaced. Panels without a value are left out.

    Raises OSError where it cannot be written.
    """
    shown = [panel for panel in PANELS if any(_keys(panel, run) for run in runs)] or [PANELS[0]]
    columns = 1 if len(shown) == 1 else 2
    lines = -(-len(shown) // columns)
    figure = Figure(figsize=(6.5 * columns, 3.6 * lines + 0.5), dpi=130, layout="constrained")
    grid = figure.subplots(lines, columns, squeeze=False).flatten()
    colors = [to_hex(colormaps["tab10"](index % 10)) for index in range(len(runs))]
    for axes, panel in zip(grid, shown, strict=False):
        draw_panel(axes, panel, runs, colors)
        axes.set_xlabel(_LABELS[axis], color=TEXT_COLOR)
        if axis is Axis.tokens:
            axes.xaxis.set_major_formatter(EngFormatter(sep=""))
        elif axis is Axis.hours:
            axes.xaxis.set_major_locator(AutoLocator())
    for axes in grid[len(shown) :]:
        axes.set_axis_off()
    handles = [
        Line2D([], [], color=color, linewidth=2, label=run.name)
        for run, color in zip(runs, colors, strict=True)
    ]
    figure.legend(handles=handles, loc="outside upper center", ncols=min(len(runs), 5), frameon=False)
    figure.savefig(path)


def _keys(panel: Panel, run: ComparedRun) -> list[str]:
    """The figures of a panel that a run has."""
    found = dict.fromkeys(key for row in run.rows for key in row)
    having = [
        key
        for wanted in panel.keys
        for key in found
        if (key.startswith(wanted) if wanted.endswith("/") else key == wanted) and run.points(key)[1]
    ]
    # Where there are parts, the whole says nothing more; rows of earlier versions have it alone.
    parts = [key for key in having if "/" in key]
    return parts or having


def draw_panel(axes: Axes, panel: Panel, runs: Sequence[ComparedRun], colors: Sequence[str]) -> None:
    """Draw one kind of figure of all runs, and where stages begin."""
    keys = list(dict.fromkeys(key for run in runs for key in _keys(panel, run)))
    dashes = dict(zip(keys, cycle(LINES), strict=False))
    for run, color in zip(runs, colors, strict=True):
        for key in _keys(panel, run):
            draw_line(axes, *run.points(key), color, dashes[key], is_smoothed=panel.is_smoothed)
        if run.start:
            axes.axvline(run.start, color=BORDER_COLOR, linewidth=1, linestyle=(0, (2, 2)))
            axes.annotate(
                f" {run.name}",
                (run.start, 1.0),
                xycoords=("data", "axes fraction"),
                va="top",
                fontsize=7,
                color=BORDER_COLOR,
            )
    style(axes, panel.title)
    axes.set_ylabel(panel.unit, color=TEXT_COLOR)
    if panel.is_log:
        axes.set_yscale("log")
        axes.grid(which="minor", axis="y", color=GRID_COLOR, linewidth=0.4)
    if len(keys) > 1:
        named = [Line2D([], [], color=TEXT_COLOR, linestyle=dashes[key], label=_short(key)) for key in keys]
        axes.legend(handles=named, frameon=False, fontsize=8, labelcolor=TEXT_COLOR)


def draw_line(
    axes: Axes, xs: list[float], ys: list[float], color: str, dash: Dash, *, is_smoothed: bool
) -> None:
    """Draw values, or their running mean over the faint values; few of them with markers."""
    if is_smoothed and len(ys) > 20:
        window = max(1, round(SMOOTHED_SHARE * len(ys)))
        means = [sum(ys[max(0, i - window + 1) : i + 1]) / min(i + 1, window) for i in range(len(ys))]
        axes.plot(xs, ys, color=color, alpha=0.2, linewidth=0.7)
        axes.plot(xs, means, color=color, linestyle=dash, linewidth=1.6)
        return
    marker = "o" if len(ys) <= 40 else ""
    axes.plot(xs, ys, color=color, linestyle=dash, linewidth=1.6, marker=marker, markersize=3.5)


def _short(key: str) -> str:
    return key.rpartition("/")[2].removeprefix("eval_").replace("_", " ")
