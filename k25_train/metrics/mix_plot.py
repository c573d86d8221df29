"""`mix.png`: what share of the tokens each source gave, and its held-out loss, over the steps of a run."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path

from matplotlib import colormaps
from matplotlib.axes import Axes
from matplotlib.colors import to_hex
from matplotlib.figure import Figure

from k25_train.metrics.plots import draw_evaluations, label_ends, style
from k25_train.metrics.sinks import Row, number

TOKENS, WEIGHT, EVALUATED = "source_tokens/", "source_weight/", "eval_loss/"
MOST_POINTS = 200
"""Points along the steps: each is the mean of what lies between it and the one before."""


def sources_of(rows: Sequence[Row]) -> list[str]:
    """Names of the sources that gave anything, in the order in which they first did."""
    names = (key.removeprefix(TOKENS) for row in rows for key in row if key.startswith(TOKENS))
    return list(dict.fromkeys(names))


def plot_mix(rows: Sequence[Row], path: Path, title: str) -> None:
    """Draw the shares of sources over steps, and below them their held-out losses, into a PNG file.

    Args:
        rows: as `sinks.read_rows` gives them.
        path: of the picture; an existing one is replaced.
        title: printed above the plot.
    """
    names = sources_of(rows)
    colors = {name: to_hex(colormaps["tab20"](number % 20)) for number, name in enumerate(names)}
    figure = Figure(figsize=(8, 7), dpi=150, layout="constrained")
    shares, losses = figure.subplots(2, 1, sharex=True)
    draw_shares(shares, rows, colors)
    ends = []
    for name, color in colors.items():
        key = f"{EVALUATED}{name}"
        ends += draw_evaluations(losses, [row for row in rows if key in row], key, name, color)
    if len(ends) <= 8:
        label_ends(losses, ends)
    style(shares, title)
    shares.set(xlabel="", ylabel="share of the tokens", ylim=(0, 1))
    style(losses, "held-out loss by source")
    figure.savefig(path)


def draw_shares(axes: Axes, rows: Sequence[Row], colors: dict[str, str]) -> None:
    """Sources on top of one another, and a dotted line where the weights changed."""
    steps, shares = shares_over_steps(rows, list(colors))
    if steps:
        axes.stackplot(steps, *shares, labels=list(colors), colors=list(colors.values()), alpha=0.85)
    for step in changes_of_weights(rows):
        axes.axvline(step, color="black", linestyle=":", linewidth=1.2)


def shares_over_steps(rows: Sequence[Row], names: Sequence[str]) -> tuple[list[float], list[list[float]]]:
    """Steps, and for each source its share of the tokens since the step before."""
    trained = [row for row in rows if any(key.startswith(TOKENS) for key in row)]
    size = max(1, -(-len(trained) // MOST_POINTS))
    groups = [trained[first : first + size] for first in range(0, len(trained), size)]
    tokens = [[_sum(group, f"{TOKENS}{name}") for group in groups] for name in names]
    totals = [max(sum(of), 1.0) for of in zip(*tokens, strict=True)]
    shares = [[each / total for each, total in zip(of, totals, strict=True)] for of in tokens]
    return [number(group[-1]["step"]) for group in groups], shares


def changes_of_weights(rows: Sequence[Row]) -> list[float]:
    """Steps from which on other weights held."""
    told = [row for row in rows if any(key.startswith(WEIGHT) for key in row)]
    return [number(now["step"]) for before, now in pairwise(told) if _weights(before) != _weights(now)]


def _weights(row: Row) -> dict[str, float]:
    return {key: number(value) for key, value in row.items() if key.startswith(WEIGHT)}


def _sum(rows: Sequence[Row], key: str) -> float:
    return sum(number(row[key]) for row in rows if key in row)
