"""Options of a toolset, as a task has them in JSON."""

from collections.abc import Mapping
from typing import Any

from k25_train.errors import ConfigError


class ToolOptions:
    """Options of a toolset, read once."""

    def __init__(self, toolset: str, given: Mapping[str, Any]) -> None:
        self._toolset = toolset
        self._given = dict(given)

    def take[T](self, name: str, kind: type[T], otherwise: T) -> T:
        """An option, or what it is without. Raises ConfigError for one of another type."""
        value = self._given.pop(name, otherwise)
        if not isinstance(value, kind) or (isinstance(value, bool) and kind is not bool):
            raise ConfigError(
                f"option {name}={value!r} of the toolset {self._toolset}: has to be a {kind.__name__}\n"
                "  -> k25_train/environments/toolsets/README.md says what each has"
            )
        return value

    def end(self) -> None:
        """Raises ConfigError for options that nobody took."""
        if self._given:
            raise ConfigError(
                f"options of the toolset {self._toolset}: it has no {', '.join(sorted(self._given))}\n"
                "  -> leave them out; k25_train/environments/toolsets/README.md says what each has"
            )
