"""Signs of life of a lock's holder that another machine can see.

The holder renews the time stamp of the file every `BEAT_S`. Whoever wants the folder watches whether the
stamp changes, so clocks need not agree. If the holder's flock is seen, it lives; if not, that says nothing.
"""

import contextlib
import fcntl
import os
import threading
import time
from collections.abc import Callable
from pathlib import Path

BEAT_S = 2.0
"""Seconds between renewals: every renewal is a request to the file system's server."""
WATCH_S = 30.0
"""Longest time that a stamp is watched: the holder's Python may be busy for seconds."""
CLOSE_S = 10.0
"""Longest time that the end of a process waits for a renewal in progress."""
PROGRESS_S = 10.0
"""Seconds between lines that tell what is waited for."""


class Heartbeat:
    """Renews a file from a thread of its own until it is closed."""

    def __init__(self, path: Path, is_lost: Callable[[], bool] = lambda: False) -> None:
        """Raises OSError if the file cannot be opened for writing.

        Args:
            path: the file.
            is_lost: asked at each beat, whether it is no longer its owner's.
        """
        self.is_lost = False
        """Whether it was lost at the latest beat."""
        self._ask = is_lost
        self._fd = os.open(path, os.O_RDWR | os.O_CLOEXEC)
        # A help where it works: not across the machines of every file system.
        with contextlib.suppress(OSError):
            fcntl.flock(self._fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        self._is_over = threading.Event()
        self._thread = threading.Thread(target=self._beat, name="run folder", daemon=True)
        self._thread.start()

    def close(self) -> None:
        """Stop; the file stays."""
        self._is_over.set()
        self._thread.join(CLOSE_S)
        # A file system that hangs keeps the thread, which must not find another file behind the number.
        if not self._thread.is_alive():
            os.close(self._fd)

    def _beat(self) -> None:
        while not self._is_over.wait(BEAT_S):
            # A file system that is unavailable for a moment; whether the lock is lost is checked elsewhere.
            with contextlib.suppress(OSError):
                os.utime(self._fd)
            self.is_lost = self._ask()


def is_renewed(path: Path, what: str, say: Callable[[str], None]) -> bool:
    """Whether the holder of a lock shows a sign of life within `WATCH_S`; False if the file goes away.

    Args:
        path: the lock.
        what: who holds what, for the lines that tell of the waiting.
        say: prints a line.
    """
    start_s = time.monotonic()
    before, told_s = _stamp(path), -PROGRESS_S
    if is_flocked(path):
        return True
    while (waited_s := time.monotonic() - start_s) < WATCH_S:
        if waited_s - told_s >= PROGRESS_S:
            told_s = waited_s
            say(f"{what}; watching whether it still lives, {waited_s:.0f} of at most {WATCH_S:g} s")
        time.sleep(min(0.5, BEAT_S))
        now = _stamp(path)
        if now != before:
            return now is not None
    return False


def is_flocked(path: Path) -> bool:
    """Whether some process is seen to have locked the file exclusively."""
    try:
        fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    except OSError:
        return False
    try:
        # Shared, so that several who look do not take each other for the holder.
        fcntl.flock(fd, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except BlockingIOError:
        return True
    except OSError:
        return False
    finally:
        os.close(fd)
    return False


def _stamp(path: Path) -> tuple[int, int] | None:
    """Inode and time stamp; None without the file. Opened, since NFS answers `stat` from a cache."""
    try:
        fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    except OSError:
        return None
    try:
        status = os.fstat(fd)
        return status.st_ino, status.st_mtime_ns
    finally:
        os.close(fd)
