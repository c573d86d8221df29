"""Whether the arguments of a call are what the tool's schema says: JSON Schema as tools use it.

Types, required and further properties, items, enumerations, bounds of numbers, lengths. Other keywords (such
as `$ref` and `oneOf` of servers elsewhere) are the tool's own to check.
"""

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

_TYPES: dict[str, tuple[type, ...]] = {
    "string": (str,),
    "integer": (int,),
    "number": (int, float),
    "boolean": (bool,),
    "array": (list,),
    "object": (dict,),
    "null": (type(None),),
}


def faults(value: Any, schema: Mapping[str, Any], where: str = "") -> Iterator[str]:
    """What is wrong with a value, each as a clause that names where; nothing for one that fits."""
    named = where or "the arguments"
    kinds = schema.get("type")
    if kinds is not None:
        allowed = [kinds] if isinstance(kinds, str) else list(kinds)
        if not any(_is_a(value, kind) for kind in allowed):
            yield f"{named} must be {' or '.join(map(str, allowed))}, not {_kind(value)}"
            return
    if "enum" in schema and value not in schema["enum"]:
        yield f"{named} must be one of {', '.join(map(repr, schema['enum']))}"
    if isinstance(value, dict):
        yield from _of_object(value, schema, where)
    elif isinstance(value, list) and isinstance(schema.get("items"), Mapping):
        for number, item in enumerate(value):
            yield from faults(item, schema["items"], f"{where}[{number}]")
    yield from _bounds(value, schema, named)


def _of_object(value: Mapping[str, Any], schema: Mapping[str, Any], where: str) -> Iterator[str]:
    properties = schema.get("properties", {})
    prefix = f"{where}." if where else ""
    for name in schema.get("required", ()):
        if name not in value:
            yield f"{prefix}{name} is missing"
    for name, item in value.items():
        if name in properties:
            yield from faults(item, properties[name], f"{prefix}{name}")
        elif schema.get("additionalProperties") is False:
            known = ", ".join(properties) or "none"
            yield f"{prefix}{name} is no argument; there is {known}"


def _bounds(value: Any, schema: Mapping[str, Any], named: str) -> Iterator[str]:
    if isinstance(value, int | float) and not isinstance(value, bool):
        size: float = value
        least, most = schema.get("minimum"), schema.get("maximum")
    elif isinstance(value, str | Sequence):
        size = len(value)
        kind = "Length" if isinstance(value, str) else "Items"
        least, most = schema.get(f"min{kind}"), schema.get(f"max{kind}")
        named = f"the length of {named}"
    else:
        return
    if least is not None and size < least:
        yield f"{named} must be at least {least}"
    if most is not None and size > most:
        yield f"{named} must be at most {most}"


def _is_a(value: Any, kind: str) -> bool:
    if isinstance(value, bool):
        return kind == "boolean"
    return isinstance(value, _TYPES.get(kind, (object,)))


def _kind(value: Any) -> str:
    return next((kind for kind in _TYPES if _is_a(value, kind)), type(value).__name__)
