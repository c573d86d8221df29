"""Waits out a run folder that cannot be read or written for the moment: a full disk, a quota, a server that
is away. One place for all that the supervisor does with the folder.

What it decided meanwhile is in memory, on stdout and in the job's comment. Ranks that need the folder fail by
themselves and are started again once a checkpoint has room.
"""

import contextlib
import errno
import os
import re
import shutil
import time
from collections.abc import Callable
from pathlib import Path

from k25_train.errors import K25Error

LIMIT_S = 24 * 3600.0
"""Longest wait: people sleep. A stop request, which comes before the job's time limit, ends it earlier."""
GONE_S = 600.0
"""Longest wait for a folder that is not there: somebody may have deleted it."""
RETRY_S, LONGEST_RETRY_S = 1.0, 30.0
"""Pause before the second try, and the longest one: pauses double."""
TELL_S = 300.0
"""Seconds between lines that tell of the waiting."""
STOPPED_S = 5.0
"""Longest wait once the job was asked to stop: it has to be back in the queue before its time is over."""
PERMANENT = (
    errno.ENAMETOOLONG, errno.ELOOP, errno.ENOTDIR, errno.EISDIR, errno.EINVAL, errno.EXDEV, errno.EFAULT,
    errno.EBADF,
)  # fmt: skip
"""Errors that no waiting removes."""
FULL = (errno.ENOSPC, errno.EDQUOT)
PROBE_BYTES = 1 << 20
_PARTIAL = re.compile(r"step_\d+(\.unsound)?(\.[0-9a-f]{8})?\.partial")
_NO_ROOM = re.compile(rf"\[Errno ({errno.ENOSPC}|{errno.EDQUOT})\]|\[(ENOSPC|EDQUOT)\]")


class UnwritableError(K25Error):
    """The run folder could not be used for longer than anyone may wait."""


class Patience:
    """Does something with the run folder, again and again until it works."""

    def __init__(
        self,
        run: Path,
        limit_s: float = 0.0,
        is_stopped: Callable[[], bool] = lambda: False,
        tell: Callable[[str], None] = print,
    ) -> None:
        """Without a limit, everything is tried once.

        Args:
            run: the run folder.
            limit_s: longest time to try.
            is_stopped: whether the job was asked to stop, so that nothing is waited for any more.
            tell: takes a line about the waiting.
        """
        self.run = run
        self.limit_s = limit_s
        self.is_stopped = is_stopped
        self.tell = tell

    def of[T](self, action: Callable[[], T]) -> T:
        """The result of an action on the run folder, which may be done several times.

        Raises:
            UnwritableError: it failed to the end.
            OSError: it fails in a way that stays, or nothing is waited for.
        """
        start_s, told_s, pause_s = time.monotonic(), -TELL_S, RETRY_S
        while True:
            try:
                result = action()
            except OSError as error:
                if self.limit_s <= 0 or error.errno in PERMANENT:
                    raise
                if error.errno in FULL:
                    remove_partials(self.run)
                waited_s, what = time.monotonic() - start_s, describe(error, self.run)
                if waited_s >= self._longest_s(error):
                    raise UnwritableError(
                        f"{what}, for {waited_s:.0f} s: make room or repair the file system, then submit the "
                        "run again"
                    ) from error
            else:
                if told_s >= 0:
                    self.tell(f"{self.run} works again after {time.monotonic() - start_s:.0f} s")
                return result
            # Wait, and say so.
            if waited_s - told_s >= TELL_S:
                told_s = waited_s
                self.tell(f"waiting for the run folder, for {waited_s:.0f} s so far: {what}")
            self._sleep(pause_s)
            pause_s = min(2 * pause_s, LONGEST_RETRY_S)

    def _longest_s(self, error: OSError) -> float:
        if self.is_stopped():
            return min(STOPPED_S, self.limit_s)
        return min(GONE_S, self.limit_s) if error.errno == errno.ENOENT else self.limit_s

    def _sleep(self, seconds: float) -> None:
        """Pause; a stop request shortens it."""
        deadline_s, was_stopped = time.monotonic() + seconds, self.is_stopped()
        while (left_s := deadline_s - time.monotonic()) > 0 and self.is_stopped() == was_stopped:
            time.sleep(min(0.2, left_s))


def describe(error: OSError, run: Path) -> str:
    """The error in words, with the path that it is about."""
    where = os.fsdecode(error.filename) if isinstance(error.filename, str | bytes) else str(run)
    code = errno.errorcode.get(error.errno or 0, "")
    return f"{where}: {error.strerror or error}{f' [{code}]' if code else ''}"


def check_room(run: Path, needed_bytes: int) -> None:
    """Raise OSError unless the run folder, and what its `checkpoints` leads to, can be written and that has
    room for `needed_bytes` more."""
    checkpoints = run / "checkpoints"
    place = checkpoints if checkpoints.is_symlink() else run
    for folder in {run, place}:
        # The same name each time: one that a kill left is overwritten.
        probe = folder / ".probe"
        try:
            with probe.open("wb") as file:
                file.write(bytes(PROBE_BYTES))
                file.flush()
                os.fsync(file.fileno())
        finally:
            with contextlib.suppress(OSError):
                probe.unlink(missing_ok=True)
    free_bytes = shutil.disk_usage(place).free
    if free_bytes < needed_bytes:
        text = f"{free_bytes:,} bytes are free, a checkpoint takes {needed_bytes:,}"
        raise OSError(errno.ENOSPC, text, str(place))


def remove_partials(run: Path) -> None:
    """Remove checkpoints that were not completed: they may be what fills the disk.

    Only while no rank is running. Those of a link go, not what it points to. Failures are passed over.
    """
    with contextlib.suppress(OSError):
        for path in (run / "checkpoints").iterdir():
            if not _PARTIAL.fullmatch(path.name):
                continue
            if path.is_symlink() or not path.is_dir():
                with contextlib.suppress(OSError):
                    path.unlink()
            else:
                shutil.rmtree(path, ignore_errors=True)


def found_no_room(logs: str, run: Path) -> str:
    """The line in which ranks say that the run folder was full, or its quota used up; empty if none does."""
    lines = (line.strip() for line in reversed(logs.splitlines()) if str(run) in line)
    return next((line for line in lines if _NO_ROOM.search(line)), "")
