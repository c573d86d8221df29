"""From an answer in words to what is judged: a final answer, the last JSON array, the last block of code."""

import json
import re
from collections.abc import Callable, Iterator
from typing import Any

from k25_train.rl.rewards.faults import ResponseFaultError, finite
from k25_train.rl.rewards.rules.boxes import Box
from k25_train.rl.rewards.rules.points import Point
from k25_train.rl.rewards.rules.polygons import Polygon

_ANSWER_LINE = re.compile(
    # Within a line: white space that spans lines would be searched again from each of them.
    r"^[^\w\n]*(?:the[ \t]+)?(?:final[ \t]+)?answer[ \t]*(?:is\b|[:=])[^\w\n]*?([^\s].*)$",
    re.IGNORECASE | re.MULTILINE,
)
_FENCE = re.compile(r"^```([\w+-]*)[^\n]*\n(.*?)^```", re.MULTILINE | re.DOTALL)
_MAX_TRIES = 1_000
"""Brackets at which an array is looked for."""
_BOX_KEYS = ("bbox_2d", "bbox", "box")
_POINT_KEYS = ("point_2d", "point")


def final_answer(content: str) -> str:
    """Body of the last `\\boxed{…}`, else what the last line `Answer: …` says, else the last line with text.

    Raises ResponseFaultError where there is none, or the last box does not close.
    """
    start = content.rfind("\\boxed{")
    if start >= 0:
        return _balanced(content, start + len("\\boxed{"))
    stated = _ANSWER_LINE.findall(content)
    if stated:
        return str(stated[-1]).strip().strip("*").strip()
    lines = [line.strip() for line in content.splitlines() if line.strip()]
    if not lines:
        raise ResponseFaultError("empty: the response has no answer")
    return lines[-1]


def _balanced(content: str, start: int) -> str:
    depth = 1
    for position in range(start, len(content)):
        depth += {"{": 1, "}": -1}.get(content[position], 0)
        if not depth:
            return content[start:position].strip()
    raise ResponseFaultError("no answer: the last \\boxed{ does not close")


def last_code(content: str, languages: tuple[str, ...]) -> str:
    """Body of the last fenced block in one of the languages, or in none. Raises ResponseFaultError."""
    blocks = [body for language, body in _FENCE.findall(content) if language.lower() in ("", *languages)]
    if not blocks:
        raise ResponseFaultError(f"no code: no fenced block in {languages[0]}")
    return str(blocks[-1])


def last_array(content: str) -> list[Any]:
    """The last JSON array that is in no other one. Raises ResponseFaultError without one."""
    decoder = json.JSONDecoder()
    found = None
    position, tries = content.find("["), 0
    while position >= 0 and tries < _MAX_TRIES:
        tries += 1
        try:
            found, position = decoder.raw_decode(content, position)
        except (ValueError, RecursionError):
            position += 1
        position = content.find("[", position)
    if not isinstance(found, list):
        raise ResponseFaultError("no answer: no JSON array in the response")
    return found


def boxes_in(values: list[Any]) -> list[Box]:
    """`[[left, top, right, bottom], …]`, or objects with `bbox_2d`, `bbox` or `box`, and `label`."""
    return [
        Box(left, top, right, bottom, label)
        for (left, top, right, bottom), label in _items(values, _BOX_KEYS, 4, "box")
    ]


def points_in(values: list[Any]) -> list[Point]:
    """`[[x, y], …]`, or objects with `point_2d` or `point`."""
    return [Point(*numbers) for numbers, _ in _items(values, _POINT_KEYS, 2, "point")]


def polygons_in(values: list[Any]) -> list[Polygon]:
    """`[[[x, y], …], …]`, or one polygon `[[x, y], …]`."""
    is_one = bool(values) and _is_list(values[0]) and bool(values[0]) and not _is_list(values[0][0])
    polygons: list[Polygon] = []
    for outline in [values] if is_one else values:
        if not _is_list(outline) or len(outline) < 3:
            raise ResponseFaultError("malformed polygon: it is no list of three or more vertices")
        vertices = [numbers for numbers, _ in _items(outline, (), 2, "vertex")]
        polygons.append([(x, y) for x, y in vertices])
    return polygons


def _is_list(value: Any) -> bool:
    return isinstance(value, list)


def _items(
    values: list[Any], keys: tuple[str, ...], size: int, name: str
) -> Iterator[tuple[list[float], str]]:
    if keys and len(values) == size and not any(isinstance(value, list | dict) for value in values):
        values = [values]  # One alone, without the list around it.
    for value in values:
        label = ""
        if isinstance(value, dict):
            label = str(value.get("label", "")).strip().casefold()
            value = next((value[key] for key in keys if key in value), None)
        if not isinstance(value, list) or len(value) != size:
            raise ResponseFaultError(f"malformed {name}: {str(value)[:40]!r} is no list of {size} numbers")
        yield [finite(number, name) for number in value], label


def expected[T](read: Callable[[list[Any]], list[T]], values: Any) -> list[T]:
    """What a reference states, by the same reader. Raises ValueError where it is malformed."""
    try:
        return read(values if isinstance(values, list) else [values])
    except ResponseFaultError as error:
        raise ValueError(str(error)) from error
