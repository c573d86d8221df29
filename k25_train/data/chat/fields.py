"""Values of a conversation's JSON, taken with the type that they must have."""

from collections.abc import Callable, Mapping
from typing import Any

from k25_train.data.formats.sample_json import SampleError


def optional[T](value: Mapping[str, Any], key: str, kind: type[T], where: str) -> T | None:
    """The value of a key; None where it is missing or null, which many writers of JSON use alike.

    Raises SampleError, naming `where` it is, if it is of another type.
    """
    found = value.get(key)
    if found is None:
        return None
    if not isinstance(found, kind) or (kind is int and isinstance(found, bool)):
        raise SampleError(f"`{key}` of {where} is {_name(found)}, not {_KINDS[kind]}")
    return found


def required[T](value: Mapping[str, Any], key: str, kind: type[T], where: str) -> T:
    """The same of a key that has to be there."""
    found = optional(value, key, kind, where)
    if found is None:
        raise SampleError(f"{where} has no `{key}`; it needs {_KINDS[kind]}")
    return found


def objects[T](found: list[Any], what: str, read: Callable[[dict[str, Any], str], T]) -> tuple[T, ...]:
    """What `read` makes of each object of a list, given the object and its name such as `message 3`."""
    for number, each in enumerate(found):
        if not isinstance(each, dict):
            raise SampleError(f"{what} {number} is {_name(each)}, not an object")
    return tuple(read(each, f"{what} {number}") for number, each in enumerate(found))


def _name(value: object) -> str:
    return _KINDS.get(type(value), f"a {type(value).__name__}")


_KINDS: dict[type, str] = {
    str: "a string",
    list: "a list",
    dict: "an object",
    bool: "true or false",
    int: "a whole number",
    float: "a number",
    type(None): "null",
}
