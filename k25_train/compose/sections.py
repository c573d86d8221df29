"""From plain values to one typed section, with every unknown, missing and mistyped key reported."""

import difflib
import math
import types
from collections.abc import Iterable, Mapping
from dataclasses import Field, fields, is_dataclass
from enum import Enum
from typing import Any, get_args

from omegaconf import Container, OmegaConf
from omegaconf.errors import ValidationError

from parallel.config import Problem

MISSING = "???"
"""How a YAML file says that a value must be given."""


def build_section(values: object, section: type, path: str) -> tuple[Any, list[Problem]]:
    """A section's typed object, or None and every problem of its keys and types."""
    if not isinstance(values, Mapping):
        names = ", ".join(field.name for field in fields(section))
        return None, [Problem(path, values, "is a section, not a value", f"set its keys: {names}")]
    problems = unknown_keys(values, section, path)
    node = OmegaConf.structured(section)
    typed = {}
    for field in fields(section):
        key, value = f"{path}.{field.name}", values.get(field.name, MISSING)
        nested = nested_section(field)
        # A section within this one, unless it may be null and is.
        if nested is not None and not (value is None and types.NoneType in get_args(field.type)):
            typed[field.name], found = build_section({} if value == MISSING else value, nested, key)
            problems += found
        elif value == MISSING:
            problems.append(Problem(key, None, "must be given", f"{key}=VALUE, {expectation(field)}"))
        # A value: OmegaConf converts it to the type of the field, or refuses it.
        else:
            try:
                node[field.name] = member_of(field, value)
                typed[field.name] = unwrap(node[field.name])
            except (ValidationError, ValueError):
                problems.append(Problem(key, value, f"must be {expectation(field)}", "correct the value"))
    return (None if problems else section(**typed)), problems


def member_of(field: "Field[Any]", value: Any) -> Any:
    """The member of a field's enumeration that is written like this; any other value as it is."""
    kind = field.type
    if isinstance(kind, type) and issubclass(kind, Enum) and value in [member.value for member in kind]:
        return kind(value)
    return value


def nested_section(field: "Field[Any]") -> type | None:
    """The section that a field holds, also where it may be null instead; None if it holds a value."""
    kinds = get_args(field.type) or (field.type,)
    return next((kind for kind in kinds if isinstance(kind, type) and is_dataclass(kind)), None)


def unwrap(node: Any) -> Any:
    """The plain value of OmegaConf's typed one.

    Raises:
        ValueError: a number is not finite, which no rule could compare.
    """
    value = OmegaConf.to_container(node) if isinstance(node, Container) else node
    numbers = value.values() if isinstance(value, dict) else [value]
    if any(isinstance(number, float) and not math.isfinite(number) for number in numbers):
        raise ValueError
    return value


def unknown_keys(values: Mapping[Any, Any], section: type, path: str) -> list[Problem]:
    """Problems of the keys that the section does not have."""
    known = [field.name for field in fields(section)]
    return [
        Problem(
            f"{path}.{key}" if path else str(key),
            value,
            f"is not a key of {path or 'the configuration'}",
            suggestion(str(key), known, "keys"),
        )
        for key, value in values.items()
        if key not in known
    ]


def suggestion(word: str, known: Iterable[str], what: str) -> str:
    """The closest known word, and all of them."""
    known = list(known)
    closest = difflib.get_close_matches(word, known, n=1)
    hint = f"did you mean {closest[0]}? " if closest else ""
    return f"{hint}known {what}: {', '.join(known)}"


def expectation(field: "Field[Any]") -> str:
    """What values a field takes, in words."""
    words = {
        int: "a whole number",
        float: "a finite number",
        bool: "true or false",
        str: "text",
        list[str]: "a list of texts",
    }
    kinds = get_args(field.type) if isinstance(field.type, types.UnionType) else (field.type,)
    choices = []
    for kind in kinds:
        if isinstance(kind, type) and issubclass(kind, Enum):
            choices.append("one of " + ", ".join(str(member.value) for member in kind))
        elif kind is types.NoneType:
            choices.append("null")
        else:
            choices.append(words.get(kind, "a mapping of names to finite numbers"))
    return " or ".join(choices)
