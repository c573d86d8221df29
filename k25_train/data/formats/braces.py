"""`{a,b}` and `{000..999}` in names, as shells and megatron-energon expand them."""

import re
from collections.abc import Iterator

_RANGE = re.compile(r"(-?[0-9]+)\.\.(-?[0-9]+)")
MAX_NAMES = 10_000_000
"""Names that one expression may stand for: what is beyond is a slip. Our choice."""


def expand_braces(pattern: str) -> Iterator[str]:
    """All names that a pattern means, in its order; itself without braces.

    Raises ValueError for one that has too many, or an open brace.
    """
    for number, name in enumerate(_expand(pattern)):
        if number == MAX_NAMES:
            raise ValueError(f"{pattern!r} has more than {MAX_NAMES} names")
        yield name


def _expand(pattern: str) -> Iterator[str]:
    before, brace, rest = pattern.partition("{")
    if not brace:
        yield pattern
        return
    choices, after = _closed(rest, pattern)
    for choice in choices:
        for inner in _expand(choice):
            for tail in _expand(after):
                yield before + inner + tail


def _closed(rest: str, pattern: str) -> tuple[list[str], str]:
    """What stands in the braces that `rest` begins within, and what follows them."""
    depth, start, choices = 0, 0, []
    for position, letter in enumerate(rest):
        if letter == "}" and depth == 0:
            choices.append(rest[start:position])
            return _ranged(choices), rest[position + 1 :]
        if letter == "," and depth == 0:
            choices.append(rest[start:position])
            start = position + 1
        depth += {"{": 1, "}": -1}.get(letter, 0)
    raise ValueError(f"{pattern!r} has a brace that is not closed")


def _ranged(choices: list[str]) -> list[str]:
    match = _RANGE.fullmatch(choices[0]) if len(choices) == 1 else None
    if match is None:
        return choices
    first, last = int(match[1]), int(match[2])
    if abs(last - first) >= MAX_NAMES:
        raise ValueError(f"{{{choices[0]}}} has more than {MAX_NAMES} names")
    # As wide as the wider one, if either begins with 0.
    has_zeros = any(len(text.lstrip("-")) > 1 and text.lstrip("-").startswith("0") for text in match.groups())
    width = max(map(len, match.groups())) if has_zeros else 0
    step = 1 if last >= first else -1
    return [f"{number:0{width}d}" for number in range(first, last + step, step)]
