"""Counts the samples that cannot be used, and stops the run when they are too many."""

import logging
import threading
from collections.abc import Callable, Iterable
from itertools import islice

from k25_train.data.formats.records import SampleRecord
from k25_train.errors import DataError

logger = logging.getLogger(__name__)

FEWEST_SEEN = 10_000
"""Samples that a share is taken of at least: early in a run one bad sample is a large share. Our choice."""
LISTED = 20
"""Samples that an error names."""


class SkipLog:
    """Samples left out so far, each counted once and logged at most once, however often met. Safe across
    threads."""

    def __init__(self, directory: str, max_skipped_samples: int | float) -> None:
        """`directory`: of the data, for messages; `max_skipped_samples`: how many are tolerated, or as a
        float their share of the samples that were drawn, at least of `FEWEST_SEEN`."""
        self._directory = directory
        self._max_skipped_samples = max_skipped_samples
        self._lock = threading.Lock()
        self._num_seen = 0
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

    def add(self, record: SampleRecord, reason: str, *, log: bool = True) -> None:
        """Note that a sample is skipped. Raises DataError, naming some, when they pass the limit.

        Without `log` it is only counted: several ranks may learn of it, and one of them logs it.
        """
        self.add_named(self.name(record), reason, log=log)

    def add_named(self, name: str, reason: str, *, log: bool) -> None:
        """Do what `add` does, for a sample by its name in messages."""
        with self._lock:
            if name in self.skipped:
                return
            self.skipped[name] = reason
            if log:
                logger.warning("skipped %s: %s", name, reason)
            if len(self.skipped) > self._most():
                raise DataError(self._too_many())

    def name(self, record: SampleRecord) -> str:
        """Where a sample is, as messages say it."""
        return f"{self._directory}/{record.shard}, sample {record.key}"

    def room_for(self, records: Iterable[SampleRecord]) -> int:
        """How many of `records` may be skipped, those that are already included."""
        with self._lock:
            known = sum(self.name(record) in self.skipped for record in records)
            return self._most() - len(self.skipped) + known

    def later_than(self, num_skipped: int) -> dict[str, str]:
        """Those behind the first `num_skipped`, as `skipped` has them."""
        with self._lock:
            return dict(islice(self.skipped.items(), num_skipped, None))

    def _most(self) -> int:
        limit = self._max_skipped_samples
        return limit if isinstance(limit, int) else int(limit * max(self._num_seen, FEWEST_SEEN))

    def _too_many(self) -> str:
        names = [f"  {where}: {why}" for where, why in islice(self.skipped.items(), LISTED)]
        if len(self.skipped) > LISTED:
            names.append(f"  and {len(self.skipped) - LISTED} more, which the log names")
        limit = self._max_skipped_samples
        of_seen = (
            "" if isinstance(limit, int) else f", which is {self._most()} after {self._num_seen} samples,"
        )
        listing = "\n".join(names)
        return (
            f"{len(self.skipped)} samples cannot be used, data.max_skipped_samples={limit}{of_seen} are "
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
