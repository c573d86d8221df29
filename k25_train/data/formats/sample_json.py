"""A sample's `.json` member: the words of its segments, or why they cannot be used."""

import json
from collections.abc import Mapping
from typing import Any, NamedTuple, NoReturn

from k25_train.data.formats.declared import UNDECLARED, DeclarationError, Declared, declared_in
from k25_train.data.formats.records import SampleRecord, TextSegment
from k25_train.errors import DataError


class SampleError(DataError):
    """Content of one sample that cannot be used; a run leaves the sample out and goes on."""

    def __init__(self, reason: str, place: str = "") -> None:
        """`reason` continues the sentence that names the sample; `place` is where it is, if that is known."""
        super().__init__(f"{place}: {reason}" if place else reason)
        self.reason = reason


class Words(NamedTuple):
    """The words of a text segment."""

    text: str
    part_tokens: tuple[int, ...]
    """Number of tokens of each of the parts in which `Tokenizer.parts` cuts the text; empty if not stored."""
    declared: Declared = UNDECLARED
    """What it says of the sample's pictures."""


def parse_words(data: bytes, record: SampleRecord) -> tuple[Words, ...]:
    """The words of a sample's segments, by position; none for a media segment.

    Raises SampleError, with the reason alone, for anything but strict JSON in UTF-8 with the segments that
    the index lists, and for words with half of a surrogate pair, which has no UTF-8.
    """
    segments = parse_sample(data).get("segments")
    if not isinstance(segments, list) or not all(isinstance(segment, dict) for segment in segments):
        raise SampleError("its JSON has no list of segments; shard and index do not belong together")
    if len(segments) != len(record.segments):
        raise SampleError(f"has {len(segments)} segments, the index says {len(record.segments)}")
    return tuple(
        _words(position, segment, isinstance(expected, TextSegment))
        for position, (segment, expected) in enumerate(zip(segments, record.segments, strict=True))
    )


def parse_sample(data: bytes, problem: str = "no sample JSON where the index says") -> dict[str, Any]:
    """The object in a `.json` member, or in a line of JSON.

    Raises SampleError, with the reason alone, if there is none; `problem` is said of what is no strict JSON.
    """
    content = parse_json(data, problem)
    if not isinstance(content, dict):
        raise SampleError(f"its JSON is a {type(content).__name__}, not an object")
    return content


def parse_json(data: bytes, problem: str = "no sample JSON where the index says") -> Any:
    """Strict JSON in UTF-8. Raises SampleError, with the reason alone, for anything else."""
    try:
        return json.loads(data.decode(), object_pairs_hook=_unique, parse_constant=_no_constant)
    except UnicodeDecodeError as error:
        raise SampleError(f"its JSON is not UTF-8 (byte {error.start})") from error
    except RecursionError as error:
        raise SampleError("its JSON is nested too deeply") from error
    except ValueError as error:
        raise SampleError(f"{problem} ({error})") from error


def surrogate_in(text: str) -> str | None:
    """Where a text has half of a surrogate pair; None if it has none."""
    try:
        text.encode()
    except UnicodeEncodeError as error:
        return f"half of a surrogate pair (U+{ord(text[error.start]):04X}) at character {error.start}"
    return None


def _words(position: int, segment: dict[str, Any], is_text: bool) -> Words:
    if not is_text:
        return Words("", ())
    text = segment.get("text")
    if not isinstance(text, str):
        found = "missing" if "text" not in segment else f"a {type(text).__name__}"
        raise SampleError(f"the text of its segment {position} is {found}, not a string")
    defect = surrogate_in(text)
    if defect is not None:
        raise SampleError(f"the text of its segment {position} has {defect}")
    stored = segment.get("part_tokens", [])
    is_valid = isinstance(stored, list) and all(type(count) is int and count >= 0 for count in stored)
    return Words(text, tuple(stored) if is_valid else (), declarations(segment, text))


def declarations(segment: Mapping[str, Any], text: str) -> Declared:
    """What the JSON object of a text declares. Raises SampleError, with the reason alone, if it cannot be."""
    try:
        return declared_in(segment, text)
    except DeclarationError as error:
        raise SampleError(str(error)) from error


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) != len(pairs):
        names = [name for name, _ in pairs]
        twice = next(name for name in names if names.count(name) > 1)
        raise ValueError(f"key {twice!r} is there twice")
    return found


def _no_constant(name: str) -> NoReturn:
    raise ValueError(f"{name} is not JSON")
