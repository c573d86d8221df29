"""A step's timeline as a picture: one row per rank."""

from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import Patch

from k25_train.metrics.plots import GRID_COLOR, TEXT_COLOR
from k25_train.metrics.timeline import Kind, RankRecord, computing_share, segments, step_s

# Computing in full colours, what others have to be waited for in pale ones.
COLORS = {
    Kind.vision_forward: "#fdae45",
    Kind.forward: "#9ecae1",
    Kind.backward: "#3f7fb5",
    Kind.forward_and_backward: "#6fa5cb",
    Kind.vision_backward: "#d94f2b",
    Kind.optimizer: "#4d9a57",
    Kind.reading: "#b58a63",
    Kind.features: "#f0a3c4",
    Kind.experts: "#c9b8e6",
    Kind.contexts: "#8fd0c4",
    Kind.pipeline: "#d4d7dc",
    Kind.collective: "#a394bd",
    Kind.other: "#f3f4f6",
}
MOST_ROWS = 32
"""More rows could not be distinguished."""
BETWEEN_REPLICAS = 0.35
"""Height of the gap between the pipelines of two replicas, in rows."""


def plot_timeline(records: Sequence[RankRecord], path: Path, title: str) -> None:
    """Draw what each rank did when into a PNG file.

    Args:
        records: aligned, in the order of the rows; those beyond the first 32 are left out, and it is said so.
        path: of the picture; an existing one is replaced.
        title: printed above it.
    """
    shown, seconds = records[:MOST_ROWS], step_s(records)
    first = shown[0].replica
    rows = [row + BETWEEN_REPLICAS * (record.replica - first) for row, record in enumerate(shown)]
    figure = Figure(figsize=(16, 1.9 + 0.45 * (rows[-1] + 1)), dpi=110, layout="constrained")
    axes = figure.subplots()
    seen: set[Kind] = {Kind.other}
    for row, record in zip(rows, shown, strict=True):
        axes.broken_barh([(0, 1e3 * seconds)], (row - 0.45, 0.9), color=COLORS[Kind.other])
        seen |= draw_row(axes, row, record)
        share = f"{computing_share(record.spans, seconds):.0%}"
        axes.text(1.006, row, share, transform=axes.get_yaxis_transform(), va="center", color=TEXT_COLOR)
    if len(shown) < len(records):
        title = f"{title} (the first {len(shown)} shown)"
    style(axes, title)
    axes.set_xlim(0, 1e3 * seconds)
    axes.set_ylim(rows[-1] + 0.5, -0.5)
    axes.set_yticks(rows, [record.label for record in shown])
    kinds = [kind for kind in Kind if kind in seen]
    figure.legend(
        handles=[Patch(facecolor=COLORS[kind], edgecolor=GRID_COLOR, label=kind.value) for kind in kinds],
        loc="outside lower center",
        ncols=-(-len(kinds) // 2),
        frameon=False,
        labelcolor=TEXT_COLOR,
    )
    figure.savefig(path)


def draw_row(axes: Axes, row: float, record: RankRecord) -> set[Kind]:
    """The segments of one rank; returns the kinds that it has."""
    bars: defaultdict[Kind, list[tuple[float, float]]] = defaultdict(list)
    for each in segments(record.spans):
        bars[each.kind].append((1e3 * each.start_s, 1e3 * (each.end_s - each.start_s)))
    for kind, spans in bars.items():
        axes.broken_barh(spans, (row - 0.45, 0.9), facecolor=COLORS[kind])
    return set(bars)


def style(axes: Axes, title: str) -> None:
    """Title, axis of time, and what is to the right of the rows."""
    axes.set_title(title, loc="left", fontsize=13, fontweight="bold", color=TEXT_COLOR)
    axes.text(
        1, 1.01, "computing", transform=axes.transAxes, ha="left", va="bottom", color=TEXT_COLOR, fontsize=9
    )
    axes.set_xlabel("milliseconds from the step's start", color=TEXT_COLOR)
    axes.tick_params(colors=TEXT_COLOR, length=0)
    for side in ("top", "right", "left"):
        axes.spines[side].set_visible(False)
    axes.spines["bottom"].set_color(GRID_COLOR)
