"""Whether a value is what JSON says."""

from typing import Any


def same(found: Any, expected: Any, tolerance: float) -> bool:
    """Whether a value is what JSON says: tuples are lists, and numbers may differ by `tolerance`."""
    if isinstance(expected, bool) or expected is None or isinstance(expected, str):
        return type(found) is type(expected) and bool(found == expected)
    if isinstance(expected, int | float):
        is_number = isinstance(found, int | float) and not isinstance(found, bool)
        return is_number and (found == expected or abs(found - expected) <= tolerance)
    if isinstance(expected, list):
        return (
            isinstance(found, list | tuple)
            and len(found) == len(expected)
            and all(same(one, other, tolerance) for one, other in zip(found, expected, strict=True))
        )
    return (
        isinstance(found, dict)
        and found.keys() == expected.keys()
        and all(same(found[key], value, tolerance) for key, value in expected.items())
    )
