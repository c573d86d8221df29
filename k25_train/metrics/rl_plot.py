"""A run of reinforcement learning in one picture: reward, accuracy, tokens, and the gap between engine and
trainer."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from k25_train.metrics.plots import TEXT_COLOR, TRAIN_COLOR, style
from k25_train.metrics.sinks import Row, is_finite, number

HELDOUT_COLOR = "#1d6fb8"
BESIDE_COLOR = "#d1600d"
SHADE = "#f3e3d3"
PHASE = "toggle/phase"
"""0 in steps with a budget, 1 in free ones; between them if a step has groups of both."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Panel:
    """One of the figures over steps."""

    title: str
    trained: str
    """Key of rows of steps."""
    heldout: str = ""
    """Key of rows of evaluations; empty for none."""
    beside: str = ""
    """Key of rows of steps that is drawn with it; empty for none."""
    words: str = ""
    """What that is, for the legend."""
    is_logarithmic: bool = False
    is_share: bool = False
    """Whether it is usually between 0 and 1, which are then shown whole."""


ARM_COLORS = ("#4b5563", "#d1600d", "#1d6fb8", "#0f766e")
COMPARED = (
    Panel(title="tokens per answer", trained="response_tokens", heldout="eval_response_tokens"),
    Panel(title="accuracy", trained="accuracy", heldout="eval_accuracy", is_share=True),
)
PANELS = (
    Panel(title="reward", trained="reward", heldout="eval_reward", is_share=True),
    Panel(title="accuracy", trained="accuracy", heldout="eval_accuracy", is_share=True),
    Panel(
        title="tokens per answer",
        trained="response_tokens",
        heldout="eval_response_tokens",
        beside="toggle/budget_tokens",
        words="budget",
    ),
    Panel(
        title="|Δ log-prob| of a token, engine to trainer",
        trained="policy/gap",
        beside="policy/gap_max",
        words="largest, rounded up",
        is_logarithmic=True,
    ),
)


def plot_run(rows: Sequence[Row], path: Path, title: str) -> None:
    """Draw the panels into a PNG file, an existing one is replaced.

    Args:
        rows: as `sinks.read_rows` gives them; a panel of which they know nothing stays empty.
        title: printed above the panels.
    """
    figure = Figure(figsize=(11, 7), dpi=150, layout="constrained")
    figure.suptitle(title, x=0.01, ha="left", fontsize=13, fontweight="bold", color="#374151")
    for axes, panel in zip(figure.subplots(2, 2).flat, PANELS, strict=True):
        _draw(axes, panel, rows)
    figure.savefig(path)


@dataclass(frozen=True, slots=True, kw_only=True)
class Arm:
    """A run among others."""

    label: str
    """For the legend; runs with the same have one colour."""
    rows: Sequence[Row]
    """Its metrics."""


def plot_arms(arms: Sequence[Arm], path: Path) -> None:
    """Draw tokens per answer and accuracy of several runs over steps into a PNG file; an existing one is
    replaced. Lines are of what was sampled in training, markers of held-out tasks."""
    labels = list(dict.fromkeys(arm.label for arm in arms))
    figure = Figure(figsize=(11, 4.5), dpi=150, layout="constrained")
    for axes, panel in zip(figure.subplots(1, 2), COMPARED, strict=True):
        phases = next((list(budget_phases(arm.rows)) for arm in reversed(arms)), [])
        for first, last in phases:
            axes.axvspan(first - 0.5, last + 0.5, color=SHADE, linewidth=0, zorder=0)
        for number_of_arm, arm in enumerate(arms):
            color = ARM_COLORS[labels.index(arm.label) % len(ARM_COLORS)]
            is_first = arm.label not in [each.label for each in arms[:number_of_arm]]
            _line(axes, arm.rows, panel.trained, arm.label if is_first else "_", color)
            _line(axes, arm.rows, panel.heldout, "_", color, marker="o", linestyle="none")
        _finish(axes, panel)
    figure.savefig(path)


def budget_phases(rows: Sequence[Row]) -> Iterator[tuple[float, float]]:
    """First and last step of each stretch of steps whose groups were held against a budget."""
    first: float | None = None
    last = 0.0
    for row in rows:
        if PHASE not in row:
            continue
        step = number(row["step"])
        if number(row[PHASE]) < 0.5:
            first, last = step if first is None else first, step
        elif first is not None:
            yield first, last
            first = None
    if first is not None:
        yield first, last


def _draw(axes: Axes, panel: Panel, rows: Sequence[Row]) -> None:
    for number_of_phase, (first, last) in enumerate(budget_phases(rows)):
        label = "steps with a budget" if not number_of_phase else None
        axes.axvspan(first - 0.5, last + 0.5, color=SHADE, linewidth=0, zorder=0, label=label)
    _line(axes, rows, panel.trained, "sampled in training", TRAIN_COLOR)
    if panel.beside:
        _line(axes, rows, panel.beside, panel.words, BESIDE_COLOR)
    if panel.heldout:
        _line(axes, rows, panel.heldout, "held-out tasks", HELDOUT_COLOR, marker="o")
    if panel.is_logarithmic and any(number(row[panel.trained]) > 0 for row in rows if panel.trained in row):
        axes.set_yscale("log")
    _finish(axes, panel)


def _finish(axes: Axes, panel: Panel) -> None:
    """Limits, title, and no unit, which the title has."""
    low, high = axes.get_ylim()
    if panel.is_share and low >= -0.05 and high <= 1.05:
        axes.set_ylim(-0.03, 1.05)
    style(axes, panel.title)
    axes.set_ylabel("")
    if axes.get_legend_handles_labels()[0]:
        # Between the mean and the largest there is room. On the bands, their own colour would not be seen.
        where = (0.0, 0.4) if panel.is_logarithmic else None
        axes.legend(
            labelcolor=TEXT_COLOR,
            facecolor="white",
            edgecolor="none",
            framealpha=0.9,
            loc="center left" if where else "best",
            bbox_to_anchor=where,
        )


def _line(
    axes: Axes,
    rows: Sequence[Row],
    key: str,
    label: str,
    color: str,
    marker: str = "",
    linestyle: str = "-",
) -> None:
    points = [
        (number(row["step"]), number(row[key])) for row in rows if key in row and is_finite(number(row[key]))
    ]
    if points:
        steps, values = zip(*points, strict=True)
        width = 1.8 if marker else 1.1
        axes.plot(
            steps,
            values,
            color=color,
            linewidth=width,
            linestyle=linestyle,
            marker=marker,
            markersize=4.5,
            label=label,
        )
