"""A chain of stages in a table and in a picture: rate, batch, vision ratio and sequence length by tokens."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterator, Sequence
from itertools import pairwise
from pathlib import Path

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from rich.console import Console

from k25_train.config.parts import ModelPart
from k25_train.config.schema import Config
from k25_train.config.span import Span
from k25_train.plan.stage_schedule import StageCurve, chain_curves
from k25_train.tables import fitting_table

Stages = Sequence[tuple[str, Config]]
"""Name and configuration of each stage, in order."""
SHORT = {
    ModelPart.language_model: "language model",
    ModelPart.vision_tower: "tower",
    ModelPart.mm_projector: "projector",
}
COLORS = {
    ModelPart.language_model: "#1d6fb8",
    ModelPart.vision_tower: "#d1600d",
    ModelPart.mm_projector: "#2f8f4e",
}
_TEXT, _GRID, _LINE, _SHADE = "#374151", "#e5e7eb", "#4b5563", "#f3f4f6"
_SEVERAL = "#4338ca"
"""Of parts that have one rate."""
_TABLES = {
    "The chain by tokens": ("tokens", "end", "steps", "sequence", "RoPE x", "batch", "vision"),
    "What its stages train": ("learning rate", "trained", "optimizer"),
}
"""Title -> columns other than the stage."""
_WORDS = ("stage", "trained", "learning rate", "batch", "optimizer")
_WIDTH_POWER = 0.3
"""A stage's width in the picture is this power of its tokens: the shortest is not a line."""
_LEAST_WIDTH = 0.55
"""Least width, as a share of the mean: its name has room."""


def explain(stages: Stages, width: int | None = None) -> str:
    """Two tables of the stages, of their sizes and of what they train; no line ends in blanks.

    Args:
        stages: name and configuration of each.
        width: characters of a line; None for those of the terminal.
    """
    width = width or shutil.get_terminal_size((140, 24)).columns
    console = Console(width=width, highlight=False, color_system=None)
    rows = [_row(curve) for curve in chain_curves(stages)]
    with console.capture() as captured:
        for title, names in _TABLES.items():
            shown = [{name: row[name] for name in ("stage", *names)} for row in rows]
            console.print(
                fitting_table(title, shown, width, least=("steps", "end"), left=_WORDS, wraps=_WORDS[1:3])
            )
    return "".join(f"{line.rstrip()}\n" for line in captured.get().splitlines())


def _row(curve: StageCurve) -> dict[str, str]:
    train, optim = curve.config.train, curve.config.optim
    return {
        "stage": curve.name,
        "tokens": in_words(curve.tokens),
        "end": in_words(curve.end),
        "steps": f"{train.steps:,}",
        "sequence": f"{train.seq_len:,}",
        "RoPE x": f"{curve.config.model.rope.scaling_factor:g}",
        "batch": _range([each.batch_tokens for each in curve.points], in_words),
        "learning rate": _rates(curve),
        "vision": _range([each.vision_ratio for each in curve.points], lambda share: f"{share:.0%}"),
        "trained": ", ".join(_trained(curve)) + ("; biases stay" if _biases_stay(curve) else ""),
        "optimizer": "/".join(dict.fromkeys(optim.of(part).name.value for part in _parts(curve))),
    }


def _parts(curve: StageCurve) -> list[ModelPart]:
    return [part for part in ModelPart if part in curve.config.optim.trained]


def _trained(curve: StageCurve) -> Iterator[str]:
    for part in _parts(curve):
        scale = curve.config.optim.of(part).lr_scale
        yield SHORT[part] + (f" x{scale:g}" if scale != 1 else "")


def _biases_stay(curve: StageCurve) -> bool:
    """Whether router biases stay at the end of a stage whose language model is trained."""
    trained = curve.config.optim.language_model.trained
    return trained and not curve.points[-1].moves_expert_bias


def _rates(curve: StageCurve) -> str:
    """The course of the rate, as `0 -> 0.0002 (500 steps), -> 2e-05 (5.5T)`."""
    optim, parts = curve.config.optim, []
    if Span.of(optim.warmup).number:
        parts.append(f"{optim.start_lr:g} → {optim.lr:g} in {_span(optim.warmup)}")
    else:
        parts.append(f"{optim.lr:g}")
    if Span.of(optim.decay).number and optim.min_lr != optim.lr:
        parts.append(f"→ {optim.min_lr:g} in the last {_span(optim.decay)}")
    return ", ".join(parts)


def _span(text: int | str) -> str:
    span = Span.of(text)
    return in_words(span.number) if span.is_tokens else f"{span.number:,} steps"


def _range[Value: (int, float)](values: Sequence[Value], text: Callable[[Value], str]) -> str:
    """The distinct values in order, at most the first and the last."""
    ends = (values[0], values[-1])
    return text(ends[0]) if ends[0] == ends[1] else f"{text(ends[0])} → {text(ends[1])}"


def in_words(tokens: int) -> str:
    """A number of tokens in three digits with its unit: 15.5T, 67.1M, 4.1K."""
    for unit, size in (("T", 10**12), ("B", 10**9), ("M", 10**6), ("K", 10**3)):
        if tokens >= size * 0.9995:
            return f"{tokens / size:.3g}{unit}"
    return str(tokens)


def draw(stages: Stages, path: Path, title: str = "The recipe, stage by stage") -> None:
    """Draw the chain into a PNG file: learning rates of the parts, tokens of a step, share of vision and
    length of sequences over the tokens. Stages are as wide as a power of their tokens, so that short ones can
    be seen.

    Args:
        stages: name and configuration of each.
        path: of the picture; an existing one is replaced.
        title: printed above it.
    """
    curves = chain_curves(stages)
    widths = _widths(curves)
    figure = Figure(figsize=(max(9.0, 1.55 * len(curves)), 9.5), dpi=150, layout="constrained")
    figure.suptitle(title, x=0.01, ha="left", fontsize=14, fontweight="bold", color=_TEXT)
    sees = any(point.vision_ratio for curve in curves for point in curve.points)
    axes: Sequence[Axes] = figure.subplots(3 + sees, 1, sharex=True, height_ratios=[2.2, *([1] * (2 + sees))])
    rate, batch, *vision, length = axes
    for curve, left, right in zip(curves, widths, widths[1:], strict=False):
        x = [left + (right - left) * (point.tokens - curve.start) / curve.tokens for point in curve.points]
        x[0] = left
        for parts, rates in rate_groups(curve).items():
            color = COLORS[parts[0]] if len(parts) == 1 else _SEVERAL
            style = "--" if 1 < len(parts) < len(ModelPart) else "-"
            rate.plot(x, rates, color=color, linewidth=2.5, linestyle=style, label=_label(parts))
        batch.plot(
            x, [each.batch_tokens for each in curve.points], color=_LINE, linewidth=2.5, drawstyle="steps-pre"
        )
        for ratio in vision:
            shares = [each.vision_ratio for each in curve.points]
            ratio.fill_between(x, shares, color="#d1600d", alpha=0.55, step="post", linewidth=0)
        length.plot([left, right], [curve.config.train.seq_len] * 2, color=_LINE, linewidth=3)
        _label_stage(rate, curve, left, right)
    _style_scales(rate, batch, length, curves)
    for ratio in vision:
        ratio.set(ylabel="vision", ylim=(0, 1))
        ratio.set_yticks([0, 0.5, 1], ["0%", "50%", "100%"])
    for each in axes:
        _style(each, widths)
    length.set_xticks(widths, ["0", *(in_words(curve.end) for curve in curves)], fontsize=8)
    length.set_xlabel("tokens of the chain (stages not to scale)", color=_TEXT)
    figure.savefig(path)


def rate_groups(curve: StageCurve) -> dict[tuple[ModelPart, ...], list[float]]:
    """Parts of one learning rate -> that rate at each point of the stage."""
    groups: dict[tuple[float, ...], tuple[ModelPart, ...]] = {}
    for part in _parts(curve):
        rates = tuple(point.rates[part] for point in curve.points)
        groups[rates] = (*groups.get(rates, ()), part)
    return {parts: list(rates) for rates, parts in groups.items()}


def _label(parts: Sequence[ModelPart]) -> str:
    return "all parts" if len(parts) == len(ModelPart) else " and ".join(SHORT[part] for part in parts)


def _widths(curves: Sequence[StageCurve]) -> list[float]:
    """Where stages begin, and where the last one ends."""
    raw = [curve.tokens**_WIDTH_POWER for curve in curves]
    least = _LEAST_WIDTH * sum(raw) / len(raw)
    edges = [0.0]
    for each in raw:
        edges.append(edges[-1] + max(each, least))
    return [edge / edges[-1] for edge in edges]


def _label_stage(axes: Axes, curve: StageCurve, left: float, right: float) -> None:
    name = curve.name.replace("_", "\n") if right - left < 0.14 else curve.name.replace("_", " ")
    axes.annotate(
        f"{name}\n{in_words(curve.tokens)}",
        ((left + right) / 2, 1.02),
        xycoords=("data", "axes fraction"),
        ha="center",
        va="bottom",
        fontsize=8.5,
        color=_TEXT,
        fontweight="bold",
    )


def _style_scales(rate: Axes, batch: Axes, length: Axes, curves: Sequence[StageCurve]) -> None:
    """Scales, labels and the legend."""
    rates = [each for curve in curves for point in curve.points for each in point.rates.values() if each > 0]
    rate.set(
        yscale="log", ylabel="learning rate", ylim=(max(min(rates), max(rates) / 3e3) / 1.5, max(rates) * 1.6)
    )
    rate.minorticks_off()
    handles, labels = rate.get_legend_handles_labels()
    lines = dict(zip(labels, handles, strict=True))
    rate.legend(
        lines.values(), lines, frameon=False, labelcolor=_TEXT, loc="lower right", ncols=4, fontsize=9
    )
    sizes = [point.batch_tokens for curve in curves for point in curve.points]
    batch.set(yscale="log", ylabel="tokens of a step", ylim=(min(sizes) / 1.6, max(sizes) * 1.6))
    marks = sorted({*(curve.points[0].batch_tokens for curve in curves), max(sizes)})
    _ticks(batch, marks, in_words)
    lengths = sorted({curve.config.train.seq_len for curve in curves})
    length.set(yscale="log", ylabel="sequence", ylim=(lengths[0] / 1.8, lengths[-1] * 1.8))
    _ticks(length, lengths, lambda tokens: f"{tokens:,}")


def _ticks(axes: Axes, marks: Sequence[int], text: Callable[[int], str]) -> None:
    """A tick at each mark that is not too close to the one below."""
    shown = [marks[0], *(after for before, after in pairwise(marks) if after > before * 1.25)]
    axes.set_yticks(shown, [text(mark) for mark in shown], fontsize=8)
    axes.minorticks_off()


def _style(axes: Axes, edges: Sequence[float]) -> None:
    """Every other stage is shaded; lines are where stages meet."""
    axes.set_xlim(0, 1)
    for number, (left, right) in enumerate(pairwise(edges)):
        if number % 2:
            axes.axvspan(left, right, color=_SHADE, zorder=0, linewidth=0)
    axes.grid(axis="y", color=_GRID, linewidth=0.8)
    axes.set_axisbelow(True)
    axes.tick_params(colors=_TEXT, length=0)
    axes.yaxis.label.set_color(_TEXT)
    for side in ("top", "right", "left"):
        axes.spines[side].set_visible(False)
    axes.spines["bottom"].set_color(_GRID)
