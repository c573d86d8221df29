"""Values as they are typed, and as the schema's types read them.

On the command line, in `--config FILE` and in `conf/` a value is a text until the type of its field is known:
no parser guesses first, so `2024_07` stays a name where a name is wanted and is refused where a number is.
One pair of quotes around a whole value is syntax, as in YAML: what is inside is the text, literally.
Without quotes `null` is null where the field may be null, `{a: 1, b: 2}` a mapping where one is wanted, and
`[a, b]` a list.
"""

import math
import re
import types
from collections.abc import Callable, Iterator, Mapping, Sequence
from enum import Enum
from typing import Any, get_args, get_origin

MISSING = "???"
"""How a YAML file says that a value must be given."""
NULL = "null"
"""How null is written, without quotes."""
QUOTED = re.compile(r"'(?:[^'\\]|\\.)*'|\"(?:[^\"\\]|\\.)*\"", re.DOTALL)
WHOLE = re.compile(r"[+-]?(?:0|[1-9][0-9]*)")
DECIMAL = re.compile(r"[+-]?(?:(?:0|[1-9][0-9]*)(?:\.[0-9]*)?|\.[0-9]+)(?:[eE][+-]?[0-9]+)?")
LARGEST = 2**63 - 1
"""Whole numbers end up in 64-bit integers of torch and of files."""


class UnreadableError(ValueError):
    """A value is not one of the type that is wanted."""


def quote(text: str) -> str:
    """The text in quotes, which `unquote` takes off again."""
    escaped = text.replace("\\", "\\\\").replace("'", "\\'")
    return f"'{escaped}'"


def is_quoted(text: str) -> bool:
    """Whether one pair of quotes holds the whole of it."""
    return QUOTED.fullmatch(text) is not None


def unquote(text: str) -> str:
    """What is in the quotes, where a backslash keeps a quote or another one; a text without them as it is."""
    return re.sub(r"\\([\\'\"])", r"\1", text[1:-1]) if is_quoted(text) else text


def unquoted(values: Any) -> Any:
    """Nested values with every text as it is meant, for display."""
    if isinstance(values, Mapping):
        return {key: unquoted(value) for key, value in values.items()}
    if isinstance(values, list):
        return [unquoted(value) for value in values]
    return unquote(values) if isinstance(values, str) else values


def read(kind: Any, value: object) -> Any:
    """A value of the type `kind`, of a text as it was typed or of a value that has the type already.

    Args:
        kind: bool, int, float, str, an enumeration, `list[str]`, `dict[str, float]`, or a union with None.

    Raises:
        UnreadableError: it is none.
    """
    if isinstance(kind, types.UnionType):
        return _first_that_reads(get_args(kind), value)
    if kind is types.NoneType:
        return _read_null(value)
    if get_origin(kind) is list:
        return _read_list(get_args(kind)[0], value)
    if get_origin(kind) is dict:
        return _read_mapping(get_args(kind)[1], value)
    if isinstance(kind, type) and issubclass(kind, Enum):
        return _read_member(kind, value)
    return _READERS[kind](value)


def _first_that_reads(kinds: tuple[Any, ...], value: object) -> Any:
    """Null first, since every text is a text too; text last."""
    order = sorted(kinds, key=lambda kind: (kind is not types.NoneType, kind is str))
    for kind in order[:-1]:
        try:
            return read(kind, value)
        except UnreadableError:
            continue
    return read(order[-1], value)


def _read_null(value: object) -> None:
    if value is not None and value != NULL:
        raise UnreadableError


def _read_text(value: object) -> str:
    if not isinstance(value, str):
        raise UnreadableError
    return unquote(value)


def _read_bool(value: object) -> bool:
    if isinstance(value, bool):
        return value
    word = _read_text(value).strip(" ").lower()
    if word not in ("true", "false"):
        raise UnreadableError
    return word == "true"


def _read_whole(value: object) -> int:
    if isinstance(value, str):
        digits = unquote(value).strip(" ")
        if len(digits) > len(str(LARGEST)) + 1 or not WHOLE.fullmatch(digits):
            raise UnreadableError
        value = int(digits)
    if not isinstance(value, int) or isinstance(value, bool) or abs(value) > LARGEST:
        raise UnreadableError
    return value


def _read_decimal(value: object) -> float:
    if isinstance(value, str):
        digits = unquote(value).strip(" ")
        if not DECIMAL.fullmatch(digits):
            raise UnreadableError
        number = float(digits)
        # Too small for a float is not what was written either.
        if number == 0 and re.search("[1-9]", re.split("[eE]", digits)[0]):
            raise UnreadableError
    elif isinstance(value, (int, float)) and not isinstance(value, bool):
        number = float(value)
    else:
        raise UnreadableError
    if not math.isfinite(number):
        raise UnreadableError
    return number


def _read_member(kind: type[Enum], value: object) -> Enum:
    if isinstance(value, kind):
        return value
    try:
        return kind(_read_text(value))
    except ValueError as error:
        raise UnreadableError from error


def _read_list(kind: Any, value: object) -> list[Any]:
    items = split_list(value) if isinstance(value, str) else value
    if not isinstance(items, Sequence) or isinstance(items, str):
        raise UnreadableError
    return [read(kind, item) for item in items]


def _read_mapping(kind: Any, value: object) -> dict[str, Any]:
    items = split_mapping(value) if isinstance(value, str) else value
    if not isinstance(items, Mapping):
        raise UnreadableError
    return {str(key): read(kind, item) for key, item in items.items()}


_READERS: dict[Any, Callable[[object], Any]] = {
    bool: _read_bool,
    int: _read_whole,
    float: _read_decimal,
    str: _read_text,
}


def split_list(text: str) -> list[str]:
    """The items of `[a, b]`, each as typed. Raises UnreadableError for anything else."""
    body = _inside(text, "[]")
    return [item.strip() for item in _split(body)] if body.strip() else []


def split_mapping(text: str) -> dict[str, str]:
    """The entries of `{a: 1, b: 2}`, each value as typed; blanks may be left out.

    Raises UnreadableError for anything else, and for a key that is there twice.
    """
    entries: dict[str, str] = {}
    body = _inside(text, "{}")
    for item in _split(body) if body.strip() else []:
        key, *rest = _split(item, ":", most=1)
        name = unquote(key.strip())
        if not rest or not name or name in entries:
            raise UnreadableError
        entries[name] = rest[0].strip()
    return entries


def _inside(text: str, brackets: str) -> str:
    stripped = text.strip()
    if len(stripped) < 2 or stripped[0] + stripped[-1] != brackets:
        raise UnreadableError
    return stripped[1:-1]


def _split(body: str, separator: str = ",", most: int = -1) -> Iterator[str]:
    """The parts between separators that are in no quotes or brackets; UnreadableError for an empty one."""
    depth, start, position = 0, 0, 0
    while position < len(body):
        character = body[position]
        # Quotes open a value or nothing: "it's" has none.
        opens = not body[start:position].strip() or body[:position].rstrip()[-1:] in tuple("[{:,")
        quoted = QUOTED.match(body, position) if character in "'\"" and opens else None
        if quoted is not None:
            position = quoted.end()
            continue
        depth += (character in "[{") - (character in "]}")
        if depth < 0:
            raise UnreadableError
        if character == separator and depth == 0 and most:
            yield _not_empty(body[start:position])
            start, most = position + 1, most - 1
        position += 1
    if depth:
        raise UnreadableError
    yield _not_empty(body[start:])


def _not_empty(part: str) -> str:
    if not part.strip():
        raise UnreadableError
    return part
