"""Answer match: numbers within a tolerance, normalised texts, and letters of a multiple choice.

K2.5 names rule-based outcome rewards and no details: all of this is our choice.
"""

import re
import unicodedata
from collections.abc import Sequence
from fractions import Fraction

from k25_train.environments.base import ACCURACY, Verdict, scored
from k25_train.rl.rewards.faults import ResponseFaultError

MAX_DIGITS = 60
MAX_EXPONENT = 100
"""Beyond them a number is no answer: as an exact fraction it could fill the memory."""
_DIGITS = r"(?:\d{1,3}(?:,\d{3})+|\d+)"
_DECIMAL = rf"(?:{_DIGITS}(?:\.\d*)?|\.\d+)"
_NUMBER = re.compile(
    rf"(?P<sign>[-+]?)\s*(?:\\[dt]?frac\{{(?P<over>{_DECIMAL})\}}\{{(?P<under>{_DECIMAL})\}}"
    rf"|(?P<decimal>{_DECIMAL})(?:\s*(?:[eE]|(?:\\times|×|\*)\s*10\^)\{{?(?P<exponent>[-+]?\d+)\}}?)?"
    rf"(?:\s*/\s*(?P<divisor>{_DECIMAL}))?)\s*(?P<percent>\\?%)?",
    re.ASCII,
)
_CHOICE = re.compile(r"\(?([A-Za-z])\)?(?:[.:)].*)?", re.DOTALL)
_FIRST = re.compile(r"\(?([A-Za-z])\)?(?=\s*,|\s+(?:or|and)\b)", re.ASCII)
_NEXT = re.compile(r"(?:,|\b(?:or|and)\b)\s*\(?([A-Z])\b", re.ASCII)
_STATED = re.compile(r"\b(?i:answer|option|choice)(?:\s+is)?:?\s*\(?([A-Z])\b", re.ASCII)


def number_match(found: Fraction, expected: Fraction, absolute: Fraction, relative: Fraction) -> Verdict:
    """1 where they differ by at most `absolute` or `relative` · |expected|, in exact arithmetic; else 0."""
    matches = float(abs(found - expected) <= max(absolute, relative * abs(expected)))
    return scored(matches, {ACCURACY: matches})


def text_match(found: str, accepted: Sequence[str]) -> Verdict:
    """1 where the text is one of the accepted ones, both normalised; else 0."""
    matches = float(normal_text(found) in {normal_text(text) for text in accepted})
    return scored(matches, {ACCURACY: matches})


def choice_match(found: str, expected: str) -> Verdict:
    """1 for the letter, whatever its case; else 0."""
    matches = float(found.casefold() == expected.casefold())
    return scored(matches, {ACCURACY: matches})


def normal_text(text: str) -> str:
    """Compatible forms as one (NFKC), without case, quotes around it, a final stop or runs of white space."""
    text = " ".join(unicodedata.normalize("NFKC", text).casefold().split())
    return text.strip("\"'“”‘’`").rstrip(".!").strip()


def number_in(text: str) -> Fraction:
    """The number that a final answer states, exactly: 1,234.5, -3/4, \\frac{3}{4}, 2e-5,
    2 \\times 10^{5}, 40%.

    Behind the last `=` if there is one; words around it, such as a unit, are passed over.
    Raises ResponseFaultError without a number, with several, or with one that is too large.
    """
    text = text.rpartition("=")[2].replace("−", "-").replace("\\,", "").replace("$", "")
    matches = list(_NUMBER.finditer(text))
    if not matches:
        raise ResponseFaultError(f"no number: {text.strip()[:40]!r}")
    values = {_value(match) for match in matches}
    if len(values) > 1:
        raise ResponseFaultError(f"several numbers: {text.strip()[:40]!r}")
    return values.pop()


def _value(match: re.Match[str]) -> Fraction:
    if len(match[0]) > MAX_DIGITS or abs(int(match["exponent"] or 0)) > MAX_EXPONENT:
        raise ResponseFaultError(f"huge: the number {match[0][:40]!r}…")
    over = _fraction(match["over"] or match["decimal"])
    under = _fraction(match["under"] or match["divisor"] or "1")
    if not under:
        raise ResponseFaultError(f"no number: {match[0][:40]!r} divides by zero")
    value = over / under * Fraction(10) ** int(match["exponent"] or 0)
    if match["percent"]:
        value /= 100
    return -value if match["sign"] == "-" else value


def _fraction(decimal: str) -> Fraction:
    return Fraction(decimal.replace(",", "").rstrip(".") or "0")


def choice_in(text: str, letters: str) -> str:
    """The letter that a final answer states: `B`, `(b)`, `B. because`, `the answer is B`.

    Raises ResponseFaultError without one, with several, or with one that is no choice.
    """
    text = text.strip().strip("*$ ")
    whole = _CHOICE.fullmatch(text)
    first = _FIRST.match(text)
    stated = (
        {whole[1]}
        if whole
        else {*_STATED.findall(text), *(first.groups() if first else ()), *_NEXT.findall(text)}
    )
    found = {letter.upper() for letter in stated}
    if len(found) != 1 or not found <= set(letters.upper()):
        kind = "several choices" if len(found) > 1 else "no choice"
        raise ResponseFaultError(f"{kind}: {text[:40]!r} names none of {letters} alone")
    return found.pop()
