"""What a text says of its sample's pictures, as its JSON declares it: it goes along with changes.

{"type": "text", "text": "a dog at [120, 300, 480, 900], left of a tree",
 "regions": [{"span": [9, 29], "kind": "box", "format": "normalized_1000", "media": 0}],
 "orientation": true}
"""

import re
from collections.abc import Mapping
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

from k25_train.errors import DataError

NUMBER = re.compile(r"[0-9]+(?:\.[0-9]+)?")
NUM_VALUES = {"box": 4, "point": 2}
"""Kind -> numbers in its span: left, top, right and bottom, or x and y."""
FORMATS = ("normalized_1000", "pixels")
"""Thousandths of width and height, or pixels of the picture as it is shown."""
OPPOSITES = {
    **{"left": "right", "leftmost": "rightmost", "leftward": "rightward", "leftwards": "rightwards"},
    **{"clockwise": "counterclockwise", "左": "右", "顺时针": "逆时针"},
}
"""Words of orientation that a mirror swaps, in lower case."""
_SWAPPED = OPPOSITES | {new: old for old, new in OPPOSITES.items()}
_KEPT = ("左右",)
"""Left and right alike."""
_LATIN = "|".join(sorted((word for word in _SWAPPED if word.isascii()), key=len, reverse=True))
_OTHERS = "|".join((*_KEPT, *(word for word in _SWAPPED if not word.isascii())))
WORD = re.compile(rf"(?<![^\W_])(?:{_LATIN})(?![^\W_])|{_OTHERS}", re.IGNORECASE)


class DeclarationError(DataError):
    """A declaration that cannot be so; says the reason alone."""


@dataclass(frozen=True, slots=True)
class Region:
    """Where a text has the coordinates of a box or a point."""

    start: int
    """First character of its span; other signs around the numbers stay."""
    stop: int
    kind: str
    """`box` or `point`."""
    format: str
    """One of `FORMATS`."""
    media: int
    """Which of the sample's images and videos, in reading order."""


@dataclass(frozen=True, slots=True)
class Declared:
    """What a text declares."""

    is_declared: bool
    """Whether it says anything: of a text that does not, nobody knows what it says of the picture."""
    regions: tuple[Region, ...] = ()
    orientation: tuple[tuple[int, int], ...] = ()
    """Spans whose words of orientation a mirror swaps."""


UNDECLARED = Declared(False)
NOTHING_TO_CARRY = Declared(True)


def declared_in(segment: Mapping[str, Any], text: str) -> Declared:
    """What the JSON object of a text declares. Raises DeclarationError if it cannot be so."""
    if "regions" not in segment and "orientation" not in segment:
        return UNDECLARED
    listed = segment.get("regions", [])
    if not isinstance(listed, list):
        raise DeclarationError("its regions are no list")
    regions = sorted((_region(each, text) for each in listed), key=lambda region: region.start)
    orientation = segment.get("orientation", False)
    if isinstance(orientation, bool):
        spans = [(0, len(text))] if orientation else []
    elif isinstance(orientation, list):
        spans = sorted(_span(each, text) for each in orientation)
        empty = next((text[slice(*span)] for span in spans if not WORD.search(text, *span)), None)
        if empty is not None:
            raise DeclarationError(f"{empty!r}, a span of its orientation, has none of {', '.join(_SWAPPED)}")
    else:
        raise DeclarationError(
            f"its orientation is {orientation!r}, neither true or false nor a list of spans"
        )
    for ordered in ([(region.start, region.stop) for region in regions], spans):
        if any(one[1] > other[0] for one, other in pairwise(ordered)):
            raise DeclarationError("spans that it declares overlap")
    return Declared(True, tuple(regions), tuple(spans))


def swapped(text: str) -> str:
    """The text as a mirror has it: words of orientation for their opposites, in the same case."""
    return WORD.sub(_opposite, text)


def _opposite(match: re.Match[str]) -> str:
    word = match[0]
    new = _SWAPPED.get(word.lower(), word)
    return new.upper() if word.isupper() else new.capitalize() if word[0].isupper() else new


def _region(given: object, text: str) -> Region:
    if not isinstance(given, dict):
        raise DeclarationError(f"its region {given!r} is no object")
    kind, form, media = given.get("kind"), given.get("format"), given.get("media", 0)
    if kind not in NUM_VALUES or form not in FORMATS or type(media) is not int or media < 0:
        raise DeclarationError(
            f"its region has kind={kind!r}, format={form!r}, media={media!r}: kind is one of "
            f"{', '.join(NUM_VALUES)}, format one of {', '.join(FORMATS)}, media a number from 0"
        )
    start, stop = _span(given.get("span"), text)
    values = [float(value) for value in NUMBER.findall(text, start, stop)]
    if len(values) != NUM_VALUES[kind]:
        raise DeclarationError(
            f"its {kind} {text[start:stop]!r} has {len(values)} numbers instead of {NUM_VALUES[kind]}"
        )
    if form == "normalized_1000" and max(values) > 1000:
        raise DeclarationError(
            f"its {kind} {text[start:stop]!r} is outside of the picture, which ends at 1000"
        )
    if kind == "box" and (values[0] > values[2] or values[1] > values[3]):
        raise DeclarationError(f"its box {text[start:stop]!r} is not left, top, right, bottom")
    return Region(start, stop, kind, form, media)


def _span(given: object, text: str) -> tuple[int, int]:
    if isinstance(given, list) and len(given) == 2 and all(type(each) is int for each in given):
        start, stop = given
        if 0 <= start < stop <= len(text):
            return start, stop
    raise DeclarationError(f"span {given!r} is no [start, end] within the {len(text)} characters of its text")
