"""Results that the stages of one plan share, computed once; torch-free."""

from collections.abc import Callable, Hashable
from typing import Any


class Memo:
    """Keeps results by keys, for as long as its plan lives."""

    def __init__(self) -> None:
        self._known: dict[Hashable, Any] = {}

    def once[Result](self, key: Hashable, make: Callable[[], Result]) -> Result:
        """What `make` returned for this key the first time."""
        if key not in self._known:
            self._known[key] = make()
        found: Result = self._known[key]
        return found
