"""The output of an attempt's srun, read as it grows: it may become long, and is looked at twice a second."""

import contextlib
import os
from pathlib import Path

from launch import scheduler
from launch.output import cut

LONGEST_LINE = 4096
"""Bytes of an incomplete line that are looked at."""


class StepLog:
    """Watches a log for the first failure of a node or task."""

    def __init__(self, path: Path, limit_bytes: int) -> None:
        """`limit_bytes` is the size that is kept of its beginning, and of its end; 0 for all."""
        self.path = path
        self.limit_bytes = limit_bytes
        self.failed: str | None = None
        """The node of the first failure; None while there is none."""
        self._read_bytes, self._rest = 0, b""

    def look(self) -> str | None:
        """The node of the first failure so far. A file that cannot be read for a moment says nothing new."""
        with contextlib.suppress(OSError):
            if self.failed is None:
                self.failed = self._first_failure()
            if self.limit_bytes:
                cut(self.path, self.limit_bytes)
        return self.failed

    def _first_failure(self) -> str | None:
        size_bytes = os.stat(self.path).st_size
        if size_bytes == self._read_bytes:
            return None
        if size_bytes < self._read_bytes:
            # It was cut: what is new lies somewhere in it.
            self._read_bytes, self._rest = 0, b""
        with self.path.open("rb") as file:
            file.seek(self._read_bytes)
            new = file.read(size_bytes - self._read_bytes)
        self._read_bytes += len(new)
        # A line may not be complete yet.
        text = self._rest + new
        self._rest = text[text.rfind(b"\n") + 1 :][:LONGEST_LINE]
        return scheduler.first_to_fail(text.decode(errors="replace"))
