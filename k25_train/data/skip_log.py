"""Counts the samples that cannot be used, and stops the run when they are too many."""

import logging
import threading
from collections.abc import Iterable

from k25_train.data.formats.records import SampleRecord
from k25_train.errors import DataError

logger = logging.getLogger(__name__)


class SkipLog:
    """Samples left out so far, each counted once and logged at most once, however often met. Safe across
    threads."""

    def __init__(self, directory: str, max_skipped_samples: int) -> None:
        """`directory`: of the shard set, for messages; `max_skipped_samples`: how many are tolerated."""
        self._directory = directory
        self._max_skipped_samples = max_skipped_samples
        self._lock = threading.Lock()
        self.skipped: dict[str, str] = {}
        """`<shard>, sample <key>` -> reason."""

    def add(self, record: SampleRecord, reason: str, *, log: bool = True) -> None:
        """Note that a sample is skipped. Raises DataError, naming all so far, when they pass the limit.

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
            if len(self.skipped) > self._max_skipped_samples:
                listing = "\n".join(f"  {where}: {why}" for where, why in self.skipped.items())
                raise DataError(
                    f"{len(self.skipped)} samples cannot be used, data.max_skipped_samples="
                    f"{self._max_skipped_samples} are allowed:\n{listing}\nFix or rebuild the shard set "
                    "(`python -m k25_train.data verify` checks all of it), or raise the limit."
                )

    def name(self, record: SampleRecord) -> str:
        """Where a sample is, as messages say it."""
        return f"{self._directory}/{record.shard}, sample {record.key}"

    def room_for(self, records: Iterable[SampleRecord]) -> int:
        """How many of `records` may be skipped, those that are already included."""
        with self._lock:
            known = sum(self.name(record) in self.skipped for record in records)
            return self._max_skipped_samples - len(self.skipped) + known
