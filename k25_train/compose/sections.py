"""From plain values to one typed section, with every unknown, missing and mistyped key reported."""

import contextlib
import difflib
import types
from collections.abc import Iterable, Mapping
from dataclasses import MISSING as DATACLASS_MISSING
from dataclasses import Field, fields, is_dataclass
from enum import Enum
from typing import Any, get_args, get_origin

from k25_train.compose.values import MISSING, NULL, read, split_mapping
from parallel.config import Problem


def build_section(values: object, section: type, path: str) -> tuple[Any, list[Problem]]:
    """A section's typed object, or None and every problem of its keys and types.

    A key that is absent has the default of its field, if that has one: only sections under free names do, as
    no file of `conf/` can give them any.
    """
    if not isinstance(values, Mapping):
        names = ", ".join(field.name for field in fields(section))
        return None, [Problem(path, values, "is a section, not a value", f"set its keys: {names}")]
    problems = unknown_keys(values, section, path)
    typed: dict[str, Any] = {}
    for field in fields(section):
        key, value = f"{path}.{field.name}", values.get(field.name, MISSING)
        nested, nullable = section_of(field.type), may_be_null(field.type)
        entry = entry_section_of(field.type)
        if field.name not in values and has_default(field):
            continue
        # Sections under free names.
        if entry is not None and value != MISSING:
            typed[field.name], found = build_entries(value, entry, key)
            problems += found
        # A section within this one, unless it may be null and is.
        elif nested is not None and not (nullable and value in (None, NULL)):
            typed[field.name], found = build_section({} if value == MISSING else value, nested, key)
            problems += found
        elif value == MISSING or (value is None and not nullable):
            problems.append(Problem(key, None, "must be given", f"{key}=VALUE, {expectation(field)}"))
        # A value, read as the field's type says.
        else:
            try:
                typed[field.name] = None if nested is not None else read(field.type, value)
            except ValueError:
                problems.append(Problem(key, value, f"must be {expectation(field)}", "correct the value"))
    return (None if problems else section(**typed)), problems


def build_entries(values: object, section: type, path: str) -> tuple[dict[str, Any], list[Problem]]:
    """Name -> typed section, of a mapping whose names are free."""
    if not isinstance(values, Mapping):
        names = ", ".join(field.name for field in fields(section))
        rule = "is a mapping of names to sections, not a value"
        return {}, [Problem(path, values, rule, f"give each name its keys: {names}")]
    built = {}
    problems: list[Problem] = []
    for name, value in values.items():
        if isinstance(value, str):
            # As typed; anything else than {…} is reported as a value in the place of a section.
            with contextlib.suppress(ValueError):
                value = split_mapping(value)
        built[str(name)], found = build_section(value, section, f"{path}.{name}")
        problems += found
    return built, problems


def has_default(field: "Field[Any]") -> bool:
    """Whether a key may be left out."""
    return field.default is not DATACLASS_MISSING or field.default_factory is not DATACLASS_MISSING


def may_be_null(kind: Any) -> bool:
    """Whether null may be in the place of a value or section of a type."""
    return types.NoneType in get_args(kind)


def entry_section_of(kind: Any) -> type | None:
    """The section that each value of a mapping is; None for any other type."""
    return section_of(get_args(kind)[-1]) if get_origin(kind) is dict else None


def section_of(kind: Any) -> type | None:
    """The section that a type is, also where null may take its place; None for the type of a value."""
    kinds = (get_args(kind) if get_origin(kind) is not dict else ()) or (kind,)
    return next((each for each in kinds if isinstance(each, type) and is_dataclass(each)), None)


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
        dict[str, str]: "a mapping of names to texts",
        dict[str, float]: "a mapping of names to finite numbers",
    }
    kinds = get_args(field.type) if isinstance(field.type, types.UnionType) else (field.type,)
    choices = []
    for kind in kinds:
        if isinstance(kind, type) and issubclass(kind, Enum):
            choices.append("one of " + ", ".join(str(member.value) for member in kind))
        elif kind is types.NoneType:
            choices.append("null")
        else:
            choices.append(words.get(kind, "a mapping of names to sections"))
    digits = ", in decimal digits without _" if {int, float} & set(kinds) else ""
    return " or ".join(choices) + digits
