"""A limit on requests per second that all processes of a node share."""

import fcntl
import os
import struct
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

BURST_S = 1.0
"""Requests that were not made for so long may be made at once. Our choice."""
_STALE_S = 3600.0
"""A time further ahead is that of a boot before this one."""
_TIME = struct.Struct("<d")


class RequestRate:
    """A token bucket in a file of the node, as the time at which the next request may be made.

    Times are those of CLOCK_MONOTONIC, which all processes of a node share. Safe across processes; what one
    has taken when it dies is used up, and nothing else.
    """

    def __init__(
        self, requests_per_s: float, folder: Path | None = None, sleep: Callable[[float], None] = time.sleep
    ) -> None:
        """`folder`: of the file; None is the node's own for temporary files."""
        self._interval_s = 1 / requests_per_s
        self._burst_s = max(BURST_S, self._interval_s)
        place = folder or Path(tempfile.gettempdir())
        self._path = place / f"k25-train-requests-{os.getuid()}-{requests_per_s:g}"
        self._sleep = sleep

    def wait(self) -> None:
        """Until one more request may be made. Raises OSError if the file cannot be used."""
        descriptor = os.open(self._path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW, 0o600)
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX)
            now_s = time.monotonic()
            data = os.pread(descriptor, _TIME.size, 0)
            next_s = _TIME.unpack(data)[0] if len(data) == _TIME.size else 0.0
            if next_s > now_s + _STALE_S:
                next_s = 0.0
            mine_s = max(next_s, now_s - self._burst_s + self._interval_s)
            os.pwrite(descriptor, _TIME.pack(mine_s + self._interval_s), 0)
        finally:
            os.close(descriptor)
        if mine_s > now_s:
            self._sleep(mine_s - now_s)


class NoLimit:
    """The do-nothing twin."""

    def wait(self) -> None:
        """Not at all."""
