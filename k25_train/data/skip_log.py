"""Counts the samples that cannot be used, and stops the run when they are too many."""

import logging
import threading
from collections.abc import Callable, Mapping
from itertools import islice

from k25_train.errors import DataError

logger = logging.getLogger(__name__)

FEWEST_SEEN = 10_000
"""Samples that a share is taken of at least: early in a run one bad sample is a large share. Our choice."""
LISTED = 20
"""Samples that an error names."""


class SkipLog:
    """Samples left out so far, each counted once and logged at most once, however often met. Safe across
    threads."""

    def __init__(self, max_skipped_samples: int | float) -> None:
        """`max_skipped_samples`: how many are tolerated, or as a float their share of the samples that were
        drawn, at least of `FEWEST_SEEN`."""
        self._max_skipped_samples = max_skipped_samples
        self._lock = threading.Lock()
        self._num_seen = 0
        self._unnamed: dict[tuple[str, int], int] = {}
        self.skipped: dict[str, str] = {}
        """`<shard>, sample <key>` -> reason, in the order in which they were met."""

    @property
    def num_seen(self) -> int:
        """Samples that were drawn so far, of all ranks."""
        return self._num_seen

    def saw(self, num_samples: int) -> None:
        """Note that so many more samples were drawn."""
        self.saw_in_all(self._num_seen + num_samples)

    def saw_in_all(self, num_samples: int) -> None:
        """Note how many were drawn; what was known before is the least."""
        with self._lock:
            self._num_seen = max(self._num_seen, num_samples)

    def add_named(self, name: str, reason: str, *, log: bool) -> None:
        """Note that a sample, by its name in messages, is skipped. Raises DataError, naming some, when they
        pass the limit.

        Without `log` it is only counted: several ranks may learn of it, and one of them logs it.
        """
        with self._lock:
            if name in self.skipped:
                return
            self.skipped[name] = reason
            if log:
                logger.warning("skipped %s: %s", name, reason)
            if self.num_skipped > self._most():
                raise DataError(self._too_many())

    def add_window(self, window: tuple[str, int], named: Mapping[str, str], num_unnamed: int) -> None:
        """Note what cannot be used of a planned window: some by name and reason, and the number of others. A
        window is counted once. Raises as `add`."""
        with self._lock:
            self._unnamed[window] = num_unnamed
        for name, reason in named.items():
            self.add_named(name, reason, log=True)
        if self.num_skipped > self._most():
            raise DataError(self._too_many())

    @property
    def num_skipped(self) -> int:
        """Samples left out so far, those without a name included."""
        return len(self.skipped) + sum(self._unnamed.values())

    @property
    def room(self) -> int:
        """How many more samples may be skipped."""
        return max(self._most() - self.num_skipped, 0)

    def later_than(self, num_skipped: int) -> dict[str, str]:
        """Those behind the first `num_skipped`, as `skipped` has them."""
        with self._lock:
            return dict(islice(self.skipped.items(), num_skipped, None))

    def _most(self) -> int:
        limit = self._max_skipped_samples
        return limit if isinstance(limit, int) else int(limit * max(self._num_seen, FEWEST_SEEN))

    def _too_many(self) -> str:
        names = [f"  {where}: {why}" for where, why in islice(self.skipped.items(), LISTED)]
        if self.num_skipped > len(names):
            more = f"  and {self.num_skipped - len(names)} more"
            names.append(more if self.num_skipped > len(self.skipped) else f"{more}, which the log names")
        limit = self._max_skipped_samples
        of_seen = (
            "" if isinstance(limit, int) else f", which is {self._most()} after {self._num_seen} samples,"
        )
        listing = "\n".join(names)
        return (
            f"{self.num_skipped} samples cannot be used, data.max_skipped_samples={limit}{of_seen} are "
            f"allowed:\n{listing}\nFix or rebuild the data (`python -m k25_train.data verify` checks all of "
            "them), or raise the limit."
        )


class NewSkips:
    """What of a log has not been told to another process yet."""

    def __init__(self, log: Callable[[], SkipLog]) -> None:
        """`log`: asked each time, as it may come to be only later."""
        self._log = log
        self._num_told = 0

    def tell_again(self) -> None:
        """An answer was dropped, and what it told with it."""
        self._num_told = 0

    def take(self) -> tuple[dict[str, str], int]:
        """The new ones, and how many samples were drawn in all."""
        log = self._log()
        found = log.later_than(self._num_told)
        self._num_told += len(found)
        return found, log.num_seen
