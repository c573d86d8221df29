"""What ranks tell each other through the store: JSON of known types, which can do nothing but be read.

Whoever reaches the store's port can write to it. A pickle from there could run any code; a JSON text becomes
a value of the type that is expected, or a `MessageError`.
"""

import json
import types
import typing
from collections.abc import Mapping, Sequence
from dataclasses import fields, is_dataclass
from functools import cache
from typing import Any, cast, get_args, get_origin

_TYPE = "type"
"""Key of an encoded dataclass that holds its name: a field may allow several."""


class MessageError(ValueError):
    """A message that is not of the expected type."""


def encode(value: object) -> str:
    """A dataclass, mapping, sequence, string, number, bool or None, nested in any way, as JSON.

    Raises `TypeError` for any other value.
    """
    return json.dumps(_plain(value))


def decode[T](text: str | bytes, kind: type[T]) -> T:
    """The value of type `kind` that `encode` wrote. Raises `MessageError` for everything else."""
    try:
        value = json.loads(text)
        return cast(T, _read(value, kind))
    except (ValueError, RecursionError) as error:
        raise MessageError(f"not a message of type {kind.__name__}: {error}") from error


def _plain(value: object) -> object:
    if is_dataclass(value) and not isinstance(value, type):
        own = {field.name: _plain(getattr(value, field.name)) for field in fields(value)}
        return {_TYPE: type(value).__name__, **own}
    # Keys need not be strings, so a mapping is a list of pairs.
    if isinstance(value, Mapping):
        return [[_plain(key), _plain(item)] for key, item in value.items()]
    if value is None or isinstance(value, str | int | float):
        return value
    if isinstance(value, Sequence):
        return [_plain(item) for item in value]
    raise TypeError(f"{value!r} cannot be sent")


def _read(value: Any, kind: Any) -> Any:
    """`value`, from JSON, as a `kind`: an annotation of a field. Raises `ValueError` if it is none."""
    origin, arguments = get_origin(kind), get_args(kind)
    if origin in (types.UnionType, typing.Union):
        return _read_union(value, arguments)
    if is_dataclass(kind):
        return _read_dataclass(value, kind)
    if kind is float and type(value) is int:
        return float(value)
    if kind in (bool, int, float, str, type(None)):
        return _checked(value, kind)
    items = _checked(value, list)
    if origin in (dict, Mapping):
        key_kind, item_kind = arguments
        pairs = [_checked(pair, list) for pair in items]
        return {_read(key, key_kind): _read(item, item_kind) for key, item in pairs}
    if origin is list:
        return [_read(item, arguments[0]) for item in items]
    if origin is tuple:
        kinds = [arguments[0]] * len(items) if arguments[-1] is Ellipsis else arguments
        return tuple(_read(item, each) for item, each in zip(items, kinds, strict=True))
    raise ValueError(f"{kind} cannot be received")


def _read_union(value: Any, kinds: Sequence[Any]) -> Any:
    for kind in kinds:
        try:
            return _read(value, kind)
        except ValueError:
            continue
    raise ValueError(f"{str(value)[:100]!r} is none of {', '.join(map(str, kinds))}")


def _read_dataclass(value: Any, kind: Any) -> Any:
    given = dict(_checked(value, dict))
    if given.pop(_TYPE, None) != kind.__name__:
        raise ValueError(f"expected {kind.__name__}")
    hints = _hints(kind)
    if given.keys() != hints.keys():
        raise ValueError(f"{kind.__name__} has fields {', '.join(hints)}, not {', '.join(given)}")
    return kind(**{name: _read(item, hints[name]) for name, item in given.items()})


def _checked(value: Any, kind: type) -> Any:
    # A bool is no int here.
    if type(value) is not kind:
        raise ValueError(f"expected {kind.__name__}, not {str(value)[:100]!r}")
    return value


@cache
def _hints(kind: type) -> dict[str, Any]:
    """Field -> its annotation."""
    hints = typing.get_type_hints(kind)
    return {field.name: hints[field.name] for field in fields(kind)}
