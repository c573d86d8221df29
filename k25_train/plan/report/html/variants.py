"""Sections about plans in which something is otherwise: mechanisms one by one, and the share of images."""

from collections.abc import Sequence

from k25_train.plan.report.html.elements import Curve, escaped, plot, section
from k25_train.plan.what_if import Row, WhatIf


def mechanism_section(found: WhatIf) -> str:
    """Throughput with each mechanism switched the other way, next to that of the configuration."""
    first, *rest = found.rows
    most = max(_rate(row) for row in found.rows) or 1.0
    rows = "".join(_bar(row, most, _rate(first)) for row in (first, *sorted(rest, key=_rate)))
    return section(
        "What each mechanism is worth",
        f"<div class=bars>{rows}</div>",
        note="Tokens per second and GPU if one thing is switched the other way, and whether that fits.",
    )


def _bar(row: Row, most: float, configured: float) -> str:
    rate = _rate(row)
    number = f"{rate:,.0f} ({rate / configured - 1:+.1%})" if rate and configured else "-"
    kind = "" if row.is_possible else " class=faded"
    return (
        f"<div class=label>{escaped(row.name)}<small>{escaped(row.verdict)}</small></div>"
        f'<div class=track><i{kind} style="width:{rate / most:.2%}"></i></div>'
        f"<div class=number>{escaped(number)}</div>"
    )


def _rate(row: Row) -> float:
    return 0.0 if row.step is None else row.step.tokens_per_s_per_gpu


def vision_section(found: WhatIf) -> str:
    """Throughput against the share of images' tokens, a curve for each place of the tower."""
    curves = vision_curves(found)
    note = "Tokens of text and images together; a curve for each place of the vision tower."
    if not curves:
        return ""
    return section(
        "Throughput with more images",
        plot(curves, "share of vision tokens", "tokens/s per GPU"),
        note=note,
    )


def vision_curves(found: WhatIf) -> Sequence[Curve]:
    """Place of the tower -> tokens per second and GPU at each share of vision tokens, where that is legal."""
    series = dict.fromkeys(row.variant.series for row in found.rows)
    curves = (
        Curve(name, tuple((row.variant.value, _rate(row)) for row in found.rows if _is_of(row, name)))
        for name in series
    )
    return [curve for curve in curves if len(curve.points) > 1]


def _is_of(row: Row, series: str) -> bool:
    return row.variant.series == series and row.step is not None
