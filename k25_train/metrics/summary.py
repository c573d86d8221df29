"""The table at the end of a run: what it did, how far the losses fell, how fast it went."""

from __future__ import annotations

from collections.abc import Sequence
from statistics import median
from typing import NamedTuple

from rich.table import Table

from k25_train.metrics.pace import PLANNED
from k25_train.metrics.sinks import Row, number
from k25_train.units import format_duration

LAST_STEPS = 10
"""The final training loss is the mean of this many steps."""


class Peak(NamedTuple):
    """What utilisation is a share of."""

    flops_per_s: float
    """Peak operations a second of all devices together, in bfloat16."""
    devices: str
    """Which devices that are."""


def summary_table(rows: Sequence[Row], title: str, peak: Peak | None = None) -> Table:
    """Summarise the rows of a whole run.

    Args:
        rows: as `sinks.read_rows` gives them.
        title: above the table.
        peak: of all devices together; None leaves utilisation (MFU) out.
    """
    table = Table(title=title, title_justify="left", show_header=False, title_style="bold")
    table.add_column(style="bold")
    table.add_column(justify="right")
    for name, value in summary_lines(rows, peak):
        table.add_row(name, value)
    return table


def summary_lines(rows: Sequence[Row], peak: Peak | None) -> list[tuple[str, str]]:
    """The table's lines, (name, value); a run that resumed counts whole."""
    steps = [row for row in rows if "loss" in row]
    if not steps:
        return [("steps", "0")]
    seconds = total(steps, "step_time_s")
    losses = [number(row["loss"]) for row in steps]
    last = losses[-LAST_STEPS:]
    lines = [
        ("steps", f"{steps[-1]['step']:,}"),
        ("tokens", f"{total(steps, 'tokens'):,.0f}, of which vision {total(steps, 'vision_tokens'):,.0f}"),
        ("images and video chunks", f"{total(steps, 'images'):,.0f}"),
        ("time in steps", format_duration(seconds)),
    ]
    # What a policy minimises is near 0 whatever it earns.
    if "reward" not in steps[-1]:
        lines.append(("training loss", change(losses[0], sum(last) / len(last))))
    for key, name in (
        ("reward", "reward"),
        ("response_tokens", "tokens per answer"),
        ("eval_text_loss", "held-out text loss"),
        ("eval_caption_loss", "held-out caption loss"),
        ("eval_reward", "held-out reward"),
        ("eval_response_tokens", "held-out tokens per answer"),
    ):
        evaluations = [number(row[key]) for row in rows if key in row]
        if evaluations:
            lines.append((name, change(evaluations[0], evaluations[-1])))
    timed = steps[1:] or steps  # the first step warms caches and allocators up
    timed_s = total(timed, "step_time_s")
    if timed_s:
        lines.append(("speed", f"{total(timed, 'tokens') / timed_s:,.0f} tokens/s"))
        flops = total(timed, "flops")
        if peak is not None and flops:
            lines.append(("MFU", f"{flops / timed_s / peak.flops_per_s:.1%} of {peak.devices}"))
    planned = [number(row[PLANNED]) for row in timed if PLANNED in row]
    if planned:
        measured_s = median(number(row["step_time_s"]) for row in timed)
        off = f"{measured_s / planned[-1] - 1:+.0%}"
        lines.append(("step", f"{measured_s:.3g} s, planned {planned[-1]:.3g} s ({off})"))
    return lines


def total(rows: Sequence[Row], key: str) -> float:
    """Sum of one metric; rows without it add nothing."""
    return sum(number(row[key]) for row in rows if key in row)


def change(before: float, after: float) -> str:
    """Two values and how far apart they are; a first value of 0 has no percentage."""
    percent = f" ({after / before - 1:+.1%})" if before else ""
    return f"{before:.4f} -> {after:.4f}{percent}"
