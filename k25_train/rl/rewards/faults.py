"""Whose fault it is that a response cannot be judged, and what is too large to judge."""

import math
from typing import Any

MAX_CHARACTERS = 200_000
"""Longest answer that is judged, in characters. Source: our choice, several times the longest responses."""
MAX_FILE_BYTES = 4 << 20
"""Files of a policy that one rule looks at, together. Source: our choice."""
MAX_COORDINATE = 1e6
"""Largest absolute coordinate. Source: our choice: images are up to some 10,000 pixels wide."""


class ResponseFaultError(Exception):
    """The response is at fault: its verdict is `failed`, with this text as the reason."""


class TaskFaultError(Exception):
    """The task is: its reference is not what the rule needs. The verdict is `unscored`."""


def finite(value: Any, name: str) -> float:
    """A number of a response. Raises ResponseFaultError unless it is one of ordinary size."""
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise ResponseFaultError(f"malformed {name}: {str(value)[:40]!r} is no number")
    try:
        number = float(value)
    except OverflowError:
        number = math.inf
    if not math.isfinite(number):
        raise ResponseFaultError(f"malformed {name}: a value is not finite")
    if abs(number) > MAX_COORDINATE:
        raise ResponseFaultError(f"malformed {name}: a value is beyond {MAX_COORDINATE:g}")
    return number


def needed(reference: Any, key: str) -> Any:
    """What the reference of a task has under a key. Raises TaskFaultError if it has nothing."""
    if not isinstance(reference, dict) or key not in reference:
        raise TaskFaultError(f"malformed reference: it has no {key!r}")
    return reference[key]


def number_of(reference: Any, key: str, otherwise: float | None = None) -> float:
    """A finite number of the reference. Raises TaskFaultError without one, and without `otherwise`."""
    if otherwise is not None and not (isinstance(reference, dict) and key in reference):
        return otherwise
    value = needed(reference, key)
    if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
        raise TaskFaultError(f"malformed reference: its {key!r} is {value!r}, not a finite number")
    return float(value)
