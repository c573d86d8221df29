"""Parts of a page: tables, rows of bars, curves. Everything is text that needs no other file and no script.

Words are laid out by the browser, in its own font; SVG holds shapes alone, which stretch with the page.
"""

import html
import math
from collections.abc import Iterable, Sequence
from typing import NamedTuple

from k25_train.plan.report.bars import Amount, amount

CURVE_KINDS = ("k1", "k4", "k3", "k2", "k5")
"""Classes of lines in the style sheet, of which no two are of one hue."""


class Curve(NamedTuple):
    """A line of a plot."""

    label: str
    """What it shows."""
    points: tuple[tuple[float, float], ...]
    """(x, y), in order of x."""


def escaped(text: str) -> str:
    """A text as it is written into HTML."""
    return html.escape(text)


def section(title: str, *parts: str, note: str = "") -> str:
    """A part of the page with its heading, and a sentence below that."""
    below = f"<p class=note>{escaped(note)}</p>" if note else ""
    return f"<section><h2>{escaped(title)}</h2>{below}{''.join(parts)}</section>"


def table(columns: Sequence[str], rows: Iterable[Sequence[str]], *, words: Sequence[int] = (0,)) -> str:
    """A table, which scrolls by itself where the page is narrow.

    Args:
        columns: their headings.
        rows: their cells.
        words: columns that hold words, aligned to the left; others hold numbers.
    """

    def cells(tag: str, texts: Sequence[str]) -> str:
        kinds = ("w" if index in words else "n" for index in range(len(texts)))
        return "".join(f"<{tag} class={k}>{escaped(t)}</{tag}>" for k, t in zip(kinds, texts, strict=True))

    body = "".join(f"<tr>{cells('td', row)}</tr>" for row in rows)
    return (
        f"<div class=scrolls tabindex=0><table><thead><tr>{cells('th', columns)}</tr></thead>"
        f"<tbody>{body}</tbody></table></div>"
    )


def bars(amounts: Sequence[Amount], unit: str, notes: Sequence[str] = (), *, from_share: float = 0.0) -> str:
    """Rows of label, bar and number.

    Args:
        amounts: the rows.
        unit: of their numbers.
        notes: a few words below each label; none if empty.
        from_share: share of the largest amount at which bars begin.
    """
    most = max((each.value for each in amounts), default=0.0) or 1.0
    rows = []
    for index, each in enumerate(amounts):
        share = max(each.value / most - from_share, 0.0) / (1 - from_share)
        note = f"<small>{escaped(notes[index])}</small>" if notes else ""
        rows.append(
            f"<div class=label>{escaped(each.label)}{note}</div>"
            f'<div class=track><i style="width:{share:.2%}"></i></div>'
            f"<div class=number>{amount(each.value)} {escaped(unit)}</div>"
        )
    return f"<div class=bars>{''.join(rows)}</div>"


def stacked(
    rows: Sequence[tuple[str, Sequence[float], str]], names: Sequence[str], most: float, limit: float | None
) -> str:
    """Rows of label, bar of several parts, and text; a line where the limit is.

    Args:
        rows: (label, an amount for each name, text behind the bar).
        names: of the parts, for the legend.
        most: amount at the right end.
        limit: amount at which the line is; None for no line.
    """
    line = "" if limit is None else f'<b class=limit style="left:{limit / most:.2%}"></b>'
    written = []
    for label, values, text in rows:
        parts = "".join(
            f'<i class="k{index % 8}" style="width:{value / most:.2%}" title="{escaped(names[index])} '
            f'{amount(value)}"></i>'
            for index, value in enumerate(values)
            if value > 0
        )
        written.append(
            f"<div class=label>{escaped(label)}</div><div class='track parts'>{parts}{line}</div>"
            f"<div class=number>{escaped(text)}</div>"
        )
    return f"{legend(names)}<div class='bars narrow'>{''.join(written)}</div>"


def legend(names: Sequence[str], kinds: Sequence[str] = ()) -> str:
    """Names of the colours.

    Args:
        names: what they mean.
        kinds: their classes in the style sheet; k0, k1 and so on without.
    """
    classes = kinds or [f"k{number % 8}" for number in range(len(names))]
    keys = (
        f'<span><i class="{kind}"></i>{escaped(name)}</span>'
        for kind, name in zip(classes, names, strict=True)
    )
    return f"<p class=legend>{''.join(keys)}</p>"


def plot(curves: Sequence[Curve], x_label: str, y_label: str) -> str:
    """Curves over one axis of percents; y begins at 0."""
    xs = [x for curve in curves for x, _ in curve.points]
    low, high = min(xs), max(xs)
    top = _round_up(max(y for curve in curves for _, y in curve.points))
    lines = ""
    kinds = CURVE_KINDS[: len(curves)]
    for kind, curve in zip(kinds, curves, strict=True):
        points = " ".join(
            f"{1000 * (x - low) / (high - low or 1):.1f},{1000 * (1 - y / top):.1f}" for x, y in curve.points
        )
        lines += f'<polyline class="{kind}" points="{points}"/>'
    grid = "".join(f'<path class=grid d="M0 {y}H1000"/>' for y in (0, 250, 500, 750, 1000))
    y_ticks = "".join(
        f'<span style="top:{100 - 25 * n}%">{escaped(f"{top * n / 4:,.0f}")}</span>' for n in range(5)
    )
    x_ticks = "".join(
        f'<span style="left:{20 * n}%">{escaped(f"{low + (high - low) * n / 5:.0%}")}</span>'
        for n in range(6)
    )
    return (
        f"{legend([curve.label for curve in curves], kinds)}<p class=axis>{escaped(y_label)}</p>"
        f"<div class=plot><div class=y>{y_ticks}</div>"
        f'<svg viewBox="0 0 1000 1000" preserveAspectRatio="none" role="img" aria-label="{escaped(y_label)}">'
        f"{grid}{lines}</svg><div class=x>{x_ticks}</div></div><p class='axis right'>{escaped(x_label)}</p>"
    )


def _round_up(value: float) -> float:
    """The next number of which a quarter is short: 4,369 -> 4,800."""
    unit = 10 ** math.floor(math.log10(value)) if value > 0 else 1.0
    return next(step * unit for step in (1, 1.2, 1.6, 2, 2.4, 3.2, 4, 4.8, 6, 8, 10) if step * unit >= value)
