"""A configuration as plain values under dotted keys."""

from collections.abc import Iterator
from dataclasses import asdict
from enum import Enum
from typing import Any


def plain_values(config: Any) -> dict[str, Any]:
    """The sections and keys of a configuration, or of a section of it, as nested mappings of plain values."""
    return asdict(config, dict_factory=lambda items: {key: plain(value) for key, value in items})


def plain(value: object) -> object:
    """The value of an enum; anything else unchanged."""
    return value.value if isinstance(value, Enum) else value


def leaves(values: dict[str, object], path: str = "") -> Iterator[tuple[str, object]]:
    """Dotted key and value of everything in nested mappings that is not itself a mapping."""
    for key, value in values.items():
        if isinstance(value, dict):
            yield from leaves(value, f"{path}{key}.")
        else:
            yield f"{path}{key}", value
