"""Says what goes wrong at once, and what goes wrong ten thousand times no oftener than one can read."""

from collections.abc import Callable
from dataclasses import dataclass


@dataclass(slots=True)
class _Said:
    at: float
    more: int = 0
    latest: str = ""


class Notices:
    """Notices by kind; the first of a kind is told at once, the others by their number and the latest."""

    def __init__(self, tell: Callable[[str], None], every_s: float) -> None:
        """
        Args:
            tell: is given each text; from the event loop, so it may not wait.
            every_s: seconds between two of one kind.
        """
        self._tell = tell
        self._every_s = every_s
        self._said: dict[str, _Said] = {}

    def say(self, kind: str, text: str, now: float) -> None:
        """Tell it, or count it where one of its kind was told lately."""
        said = self._said.get(kind)
        if said is None:
            self._said[kind] = _Said(now)
            self._tell(text)
            return
        said.more += 1
        said.latest = text

    def tick(self, now: float) -> None:
        """Tell what was counted, of kinds that were told long enough ago."""
        for kind, said in list(self._said.items()):
            if now - said.at < self._every_s:
                continue
            if said.more:
                others = f" ({said.more - 1:,} more like it since)" if said.more > 1 else ""
                self._tell(said.latest + others)
                self._said[kind] = _Said(now)
            else:
                del self._said[kind]
