"""Statistics as one picture: tokens per source, lengths of texts, sizes and shapes of media."""

from collections.abc import Sequence
from pathlib import Path

import matplotlib
import numpy as np
from matplotlib.axes import Axes

from k25_train.data.overview.statistics import SourceStatistics

COLOURS = ("#1f5f99", "#d1603d", "#3a8f5c", "#8a63a8", "#b8962e", "#4ba3b5", "#a34a6b", "#6b6b6b")
BINS = 60
MOST_SOURCES = 20
"""Bars of sources that still can be read; the others are one bar."""


def draw(sources: Sequence[SourceStatistics], path: Path, title: str) -> None:
    """Write a PNG of four panels; those of media are left out where there are none."""
    matplotlib.use("agg")
    from matplotlib import pyplot

    with_media = [each for each in sources if each.num_media]
    rows = 2 if with_media else 1
    figure, axes = pyplot.subplots(rows, 2, figsize=(12, 4.4 * rows), layout="constrained", squeeze=False)
    colours = {each.name: COLOURS[number % len(COLOURS)] for number, each in enumerate(sources)}
    figure.suptitle(title, x=0.01, ha="left", fontsize=12)
    _tokens(axes[0, 0], sources, colours)
    _lengths(axes[0, 1], sources, colours)
    if with_media:
        _sides(axes[1, 0], with_media, colours)
        _aspects(axes[1, 1], with_media, colours)
    for axis in axes.flat:
        axis.spines[["top", "right"]].set_visible(False)
    figure.savefig(path, dpi=120)
    pyplot.close(figure)


def _tokens(axis: Axes, sources: Sequence[SourceStatistics], colours: dict[str, str]) -> None:
    largest = sorted(sources, key=lambda each: -each.num_tokens)
    shown, others = largest[:MOST_SOURCES], largest[MOST_SOURCES:]
    names = [each.name for each in shown] + (["others"] if others else [])
    counts = [each.num_tokens for each in shown] + (
        [sum(each.num_tokens for each in others)] if others else []
    )
    bars = axis.barh(names, counts, color=[colours.get(name, COLOURS[-1]) for name in names])
    axis.bar_label(bars, [f"{count:,}" for count in counts], padding=3, fontsize=8)
    axis.invert_yaxis()
    axis.margins(x=0.2)
    axis.set_title("text tokens per source", loc="left", fontsize=10)


def _lengths(axis: Axes, sources: Sequence[SourceStatistics], colours: dict[str, str]) -> None:
    longest = max((int(each.text_tokens.max()) for each in sources if len(each.text_tokens)), default=1)
    _histograms(axis, {each.name: each.text_tokens for each in sources}, (1, max(longest, 2)), colours)
    axis.set_title("text tokens per sample (share of samples)", loc="left", fontsize=10)


def _sides(axis: Axes, sources: Sequence[SourceStatistics], colours: dict[str, str]) -> None:
    sides = {each.name: np.maximum(each.width, each.height) for each in sources}
    largest = max(int(values.max()) for values in sides.values())
    _histograms(axis, sides, (10, max(largest, 11)), colours)
    axis.set_title("longer side in pixels (share of images and videos)", loc="left", fontsize=10)


def _aspects(axis: Axes, sources: Sequence[SourceStatistics], colours: dict[str, str]) -> None:
    ratios = {each.name: each.aspect_ratio for each in sources}
    widest = max(float(max(values.max(), 1 / values.min())) for values in ratios.values())
    _histograms(axis, ratios, (1 / (1.1 * widest), 1.1 * widest), colours)
    axis.axvline(1, color="#999999", linewidth=0.8)
    axis.set_title("width by height (share of images and videos)", loc="left", fontsize=10)


def _histograms(
    axis: Axes,
    values: dict[str, np.ndarray],
    limits: tuple[float, float],
    colours: dict[str, str],
) -> None:
    """Outlines over a logarithmic axis, each of the share of its own values."""
    edges = np.geomspace(*limits, BINS + 1)
    for name, own in values.items():
        if len(own):
            shares = np.histogram(np.clip(own, *limits), edges)[0] / len(own)
            axis.stairs(shares, edges, color=colours[name], label=name, linewidth=1.4)
    axis.set_xscale("log")
    if axis.get_legend_handles_labels()[0]:
        axis.legend(frameon=False, fontsize=8)
