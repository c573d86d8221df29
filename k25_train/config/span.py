"""Spans of a run: a number of steps, or of tokens with a suffix, as in `500`, `67M` or `5.5T`.

Schedules are by tokens where a span says so, so that they mean the same at every batch size.
"""

import re
from collections.abc import Iterable
from dataclasses import dataclass
from fractions import Fraction

from parallel.config import Problem

SpanText = int | str
"""A span as a configuration holds it; see `Span.read`."""
_TOKENS = re.compile(r"(\d{1,6}(?:\.\d{1,12})?) ?([KMBT])")
_STEPS = re.compile(r"\d{1,18}", re.ASCII)
_UNITS = {"K": 10**3, "M": 10**6, "B": 10**9, "T": 10**12}


@dataclass(frozen=True, slots=True)
class Span:
    """A part of a run, in one unit."""

    number: int
    """Steps or tokens."""
    is_tokens: bool
    """Whether tokens are counted."""

    @classmethod
    def read(cls, text: SpanText) -> "Span | None":
        """The span that a configuration's value means; None if it means none.

        Suffixes are powers of ten: K, M, B and T are 10^3, 10^6, 10^9 and 10^12 tokens.
        """
        if _STEPS.fullmatch(str(text)):
            return cls(int(text), is_tokens=False)
        match = _TOKENS.fullmatch(str(text))
        if match is None:
            return None
        number = Fraction(match[1]) * _UNITS[match[2]]
        return cls(int(number), is_tokens=True) if number.denominator == 1 else None

    @classmethod
    def of(cls, text: SpanText) -> "Span":
        """The same of a checked configuration's value. Raises ValueError if it is none."""
        span = cls.read(text)
        if span is None:
            raise ValueError(f"{text!r} is neither a number of steps nor one of tokens")
        return span


def not_spans(section: object, names: Iterable[str]) -> list[Problem]:
    """Problems of the named fields that are no spans."""
    values = ((name, getattr(section, name)) for name in names)
    rule = "must be a number of steps, or one of tokens with K, M, B or T"
    return [
        Problem(name, value, rule, "e.g. 500, 67M or 5.5T") for name, value in values if not Span.read(value)
    ]
