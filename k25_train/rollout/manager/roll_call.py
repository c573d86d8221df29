"""Work that was given out and that nobody does: a group that is lost is in no event loop, and so never stuck.

    given ─► a record ─► a record ─► …  done              silent for stuck_s ─► does anybody know it? ─► lost

The controller keeps it, next to the journal; who does the work says by name what it has.
"""

from collections.abc import Callable, Collection, Iterator
from contextlib import contextmanager

GIVEN = "given"
"""In the place of a record's kind, before there is one."""


class Entry:
    """Work that was given out."""

    __slots__ = ("_clock", "group", "heard_at", "kind", "name", "was_told")

    def __init__(self, name: str, group: int, clock: Callable[[], float]) -> None:
        self._clock = clock
        self.name, self.group = name, group
        self.kind = GIVEN
        """Of the latest record."""
        self.heard_at = clock()
        """When it came."""
        self.was_told = False
        """Whether the log has it as lost."""

    def heard(self, kind: str) -> None:
        """A record of it has come."""
        self.kind, self.heard_at, self.was_told = kind, self._clock(), False


class RollCall:
    """All work that was given out, and is not done."""

    def __init__(
        self,
        stuck_s: float,
        known: Callable[[], Collection[str]],
        notice: Callable[[str], None],
        clock: Callable[[], float],
    ) -> None:
        """
        Args:
            stuck_s: seconds without a record after which work has to be known to somebody.
            known: names of all rollouts that live or wait, in all event loops.
            notice: is given lines for the log.
            clock: seconds.
        """
        self._stuck_s, self._known, self._notice, self._clock = stuck_s, known, notice, clock
        self._entries: dict[Entry, None] = {}

    def __len__(self) -> int:
        return len(self._entries)

    @contextmanager
    def given(self, name: str, group: int) -> Iterator[Entry]:
        """Within: somebody is to do it."""
        entry = Entry(name, group, self._clock)
        self._entries[entry] = None
        try:
            yield entry
        finally:
            del self._entries[entry]

    def look(self) -> list[str]:
        """Name what is lost, once until it is heard of; returns the names of all that is."""
        now = self._clock()
        silent = [each for each in self._entries if now - each.heard_at >= self._stuck_s]
        if not silent:
            return []
        known = self._known()
        lost = [each for each in silent if each.name not in known]
        for each in lost:
            if not each.was_told:
                each.was_told = True
                self._notice(
                    f"{each.name}: lost: group {each.group} waits for it, no record for "
                    f"{now - each.heard_at:.1f} s, behind phase {each.kind}, and no event loop has it"
                )
        return [each.name for each in lost]
