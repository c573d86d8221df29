"""Gymnasium's spaces as JSON: a schema of what may be done, an action from it, an observation as text.

| space | JSON |
|---|---|
| Discrete | an integer, or one of its names |
| MultiDiscrete, MultiBinary | a list of integers |
| Text | a string |
| Box | a list of at most 64 numbers; integers where its dtype is integral |
| Tuple, Dict | a list, an object of the others |
"""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

MAX_NUMBERS = 64
"""Numbers of a Box that can be written by hand. Our choice."""


class UnsupportedSpaceError(TypeError):
    """A space that has no form as JSON here."""


def schema_of(space: Any, names: Sequence[str] = ()) -> dict[str, Any]:
    """JSON schema of a space's elements. Raises UnsupportedSpaceError.

    `names`: of the actions of a Discrete space, in order; empty for their numbers.
    """
    match type(space).__name__:
        case "Discrete" if names:
            return {"type": "string", "enum": list(names)}
        case "Discrete":
            first = int(space.start)
            return {"type": "integer", "minimum": first, "maximum": first + int(space.n) - 1}
        case "MultiDiscrete" | "MultiBinary":
            size = int(np.prod(space.shape))
            return {"type": "array", "items": {"type": "integer"}, "minItems": size, "maxItems": size}
        case "Text":
            return {"type": "string", "minLength": int(space.min_length), "maxLength": int(space.max_length)}
        case "Box" if np.prod(space.shape) <= MAX_NUMBERS:
            size = int(np.prod(space.shape))
            kind = "integer" if np.issubdtype(space.dtype, np.integer) else "number"
            return {"type": "array", "items": {"type": kind}, "minItems": size, "maxItems": size}
        case "Tuple":
            return {"type": "array", "prefixItems": [schema_of(each) for each in space.spaces]}
        case "Dict":
            inner = {name: schema_of(each) for name, each in space.spaces.items()}
            return {"type": "object", "properties": inner, "required": list(inner)}
    raise UnsupportedSpaceError(f"{space}: neither text nor few numbers")


def element_of(space: Any, value: object, names: Sequence[str] = ()) -> Any:
    """The element of a space that JSON stands for. Raises ValueError or TypeError for none of it."""
    found = _element(space, value, names)
    if not space.contains(found):
        raise ValueError(f"{value!r} is not in {space}")
    return found


def _element(space: Any, value: Any, names: Sequence[str]) -> Any:
    match type(space).__name__:
        case "Discrete" if names and isinstance(value, str):
            return space.start + names.index(value)
        case "Discrete":
            if isinstance(value, bool) or not isinstance(value, int):
                raise TypeError(f"{value!r} is no integer")
            return np.int64(value)
        case "MultiDiscrete" | "MultiBinary" | "Box":
            found = np.array(value)
            # Rounding would do something else than was asked for.
            if found.dtype == object or (np.issubdtype(space.dtype, np.integer) and found.dtype.kind != "i"):
                raise TypeError(f"{value!r} are not the numbers of {space}")
            return found.astype(space.dtype).reshape(space.shape)
        case "Tuple":
            if not isinstance(value, list) or len(value) != len(space.spaces):
                raise TypeError(f"{value!r} is no list of {len(space.spaces)}")
            return tuple(_element(inner, each, ()) for inner, each in zip(space.spaces, value, strict=True))
        case "Dict":
            if not isinstance(value, Mapping) or set(value) != set(space.spaces):
                raise TypeError(f"{value!r} has not the keys {', '.join(space.spaces)}")
            return {name: _element(inner, value[name], ()) for name, inner in space.spaces.items()}
    return value


def plain(value: object) -> Any:
    """An observation as JSON has it."""
    if isinstance(value, np.ndarray | np.generic):
        return value.tolist()
    if isinstance(value, Mapping):
        return {str(name): plain(each) for name, each in value.items()}
    if isinstance(value, tuple | list):
        return [plain(each) for each in value]
    return value
