"""`${oc.env:NAME}`, `${oc.env:NAME,DEFAULT}` and `${SECTION.KEY}` in values without quotes.

They are read in `conf/` and on the command line, which belong to whoever starts the run; a saved one
may come from elsewhere and is read literally. What a variable holds is a text like one that was typed.
"""

import os
import re
from collections.abc import Mapping
from typing import Any

from k25_train.compose.values import is_quoted
from parallel.config import Problem

REFERENCE = re.compile(r"\$\{(?:oc\.env:([A-Za-z_]\w*)(?:,([^${}]*))?|([A-Za-z_]\w*(?:\.\w+)*))\}", re.ASCII)
OPENS = "${"
MOST_STEPS = 16
"""References to references that are followed."""
FORMS = (
    "known are ${oc.env:NAME}, ${oc.env:NAME,DEFAULT} and ${SECTION.KEY}; '...' in quotes is taken literally"
)


def resolve_references(values: Mapping[str, Any]) -> tuple[dict[str, Any], list[Problem]]:
    """The values with every reference replaced by what it refers to, and those that refer to nothing."""
    problems: list[Problem] = []

    def visit(value: object, key: str) -> object:
        if isinstance(value, Mapping):
            return {name: visit(item, f"{key}.{name}" if key else str(name)) for name, item in value.items()}
        if isinstance(value, list):
            return [visit(item, f"{key}.{index}") for index, item in enumerate(value)]
        if not refers(value):
            return value
        try:
            return _replaced(str(value), values, MOST_STEPS)
        except LookupError as error:
            problems.append(Problem(key, value, str(error.args[0]), FORMS))
            return value

    return {name: visit(value, str(name)) for name, value in values.items()}, problems


def find_references(values: Mapping[str, Any], path: str = "") -> list[Problem]:
    """Every value of a saved configuration that has a reference in it, or what looks like one."""
    found = []
    for name, value in values.items():
        if isinstance(value, Mapping):
            found += find_references(value, f"{path}{name}.")
        for item in value if isinstance(value, list) else [value]:
            if refers(item):
                rule = "refers to something, which a saved one may not"
                found.append(
                    Problem(f"{path}{name}", item, rule, "write the value; in quotes it is the text")
                )
    return found


def refers(value: object) -> bool:
    """Whether a value is a text without quotes in which a reference opens."""
    return isinstance(value, str) and OPENS in value and not is_quoted(value)


def _replaced(text: str, values: Mapping[str, Any], steps: int) -> str:
    def lookup(match: re.Match[str]) -> str:
        variable, default, key = match.groups()
        if variable is not None:
            found = os.environ.get(variable, default)
            if found is None:
                raise LookupError(f"refers to the environment variable {variable}, which is not set")
            return found
        return _value_at(key, values, steps)

    if OPENS in REFERENCE.sub("", text):
        raise LookupError("has a reference that cannot be read")
    return REFERENCE.sub(lookup, text)


def _value_at(key: str, values: Mapping[str, Any], steps: int) -> str:
    found: Any = values
    for name in key.split("."):
        found = found.get(name) if isinstance(found, Mapping) else None
    if isinstance(found, str) and steps:
        return _replaced(found, values, steps - 1) if refers(found) else found
    raise LookupError(f"refers to {key}, which {'has no value' if steps else 'refers back to it'}")
