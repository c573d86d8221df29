"""Amounts as aligned rows of text with bars, the largest first."""

from collections.abc import Sequence
from typing import NamedTuple

BLOCKS = " ▏▎▍▌▋▊▉█"
"""Eighths of a character, which an ASCII terminal gets as `#` (`k25_train/terminal.py`)."""
LEAST_BAR, NUMBER_WIDTH = 6, 6


class Amount(NamedTuple):
    """One row."""

    label: str
    """What it is."""
    value: float
    """How much, in the unit that the heading names."""


def largest(amounts: Sequence[Amount], num_rows: int) -> list[Amount]:
    """The largest amounts, the others added up in a last row where they are more than fit."""
    ordered = sorted((each for each in amounts if each.value > 0), key=lambda each: -each.value)
    if len(ordered) <= num_rows:
        return ordered
    kept, rest = ordered[: num_rows - 1], ordered[num_rows - 1 :]
    return [*kept, Amount(f"{len(rest)} smaller ones", sum(each.value for each in rest))]


def bar(share: float, width: int) -> str:
    """A bar of that share of `width` characters, in eighths; something of it is seen of any share above 0."""
    eighths = max(round(8 * width * min(max(share, 0.0), 1.0)), 1 if share > 0 else 0)
    return BLOCKS[8] * (eighths // 8) + (BLOCKS[eighths % 8] if eighths % 8 else "")


def bar_rows(amounts: Sequence[Amount], width: int, label_width: int) -> list[str]:
    """A row each: label, number, share of all of them, bar; none is longer than `width`.

    Args:
        amounts: the rows, in their order.
        width: characters of a row.
        label_width: characters of the labels; longer ones are cut.
    """
    total = sum(each.value for each in amounts) or 1.0
    most = max((each.value for each in amounts), default=0.0) or 1.0
    room = max(width - label_width - NUMBER_WIDTH - len(" 100% "), LEAST_BAR)
    return [
        f"{short(each.label, label_width):<{label_width}}{amount(each.value):>{NUMBER_WIDTH}}"
        f"{each.value / total:>5.0%} {bar(each.value / most, room)}"
        for each in amounts
    ]


def side_by_side(left: Sequence[str], right: Sequence[str], width: int) -> list[str]:
    """Two columns, the right one from character `width` on."""
    rows = range(max(len(left), len(right)))
    texts = ([*part, *[""] * (len(rows) - len(part))] for part in (left, right))
    return [f"{one:<{width}}{other}".rstrip() for one, other in zip(*texts, strict=True)]


def amount(value: float) -> str:
    """A number in three or four characters: 1,234 or 56.7 or 0.12."""
    return f"{value:,.0f}" if abs(value) >= 100 else f"{value:.1f}" if abs(value) >= 10 else f"{value:.2f}"


def short(text: str, width: int) -> str:
    """A text cut to so many characters."""
    return text if len(text) <= width else text[: width - 1] + "…"
