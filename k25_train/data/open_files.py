"""Files that stay open between reads: opening one costs a shared file system more than reading a sample."""

import errno
import os
import threading
import time
from collections import OrderedDict
from dataclasses import dataclass

MAX_OPEN = 128
"""Files kept open, those used last. Our choice; a process may usually have 1,024."""
RECHECK_S = 5.0
"""How long a file counts as the one under its name: one that was replaced, or brought back, is read from then
on. Our choice."""
_NOWAIT: int = getattr(os, "RWF_NOWAIT", 0)
"""Of preadv: read what is in memory or fail (Linux 4.14)."""
_TOO_MANY = (errno.EMFILE, errno.ENFILE)


@dataclass(slots=True)
class _OpenFile:
    """A file that is open, closed when nobody refers to it any more."""

    descriptor: int
    identity: tuple[int, int, int, int]
    checked_s: float

    def __del__(self) -> None:
        os.close(self.descriptor)


class OpenFiles:
    """Reads local files at an offset. Safe across threads and forks: no file has a position."""

    def __init__(self, max_open: int = MAX_OPEN) -> None:
        """`max_open`: files kept open between reads."""
        self._max_open = max_open
        self._lock = threading.Lock()
        self._files: OrderedDict[str, _OpenFile] = OrderedDict()

    def read(self, path: str, offset: int, num_bytes: int) -> bytes:
        """`num_bytes` of a file from `offset`, fewer if it ends before. Raises OSError, after which the file
        is opened again."""
        file = self._file(path)
        try:
            parts = []
            while num_bytes and (part := os.pread(file.descriptor, num_bytes, offset)):
                parts.append(part)
                offset, num_bytes = offset + len(part), num_bytes - len(part)
        except OSError:
            self.forget(path)
            raise
        return parts[0] if len(parts) == 1 else b"".join(parts)

    def read_cached(self, path: str, offset: int, num_bytes: int) -> bytes | None:
        """The same if the file is open and the kernel has these bytes in memory, so that it cannot hang; else
        None."""
        with self._lock:
            file = self._files.get(path)
        if file is None or time.monotonic() - file.checked_s >= RECHECK_S or not _NOWAIT:
            return None
        data = bytearray(num_bytes)
        try:
            found = os.preadv(file.descriptor, [data], offset, _NOWAIT)
        except OSError:  # not in memory, or a file system that cannot tell
            return None
        return bytes(data) if found == num_bytes else None

    def forget(self, path: str) -> None:
        """Open a file again when it is read next."""
        with self._lock:
            self._files.pop(path, None)

    def _file(self, path: str) -> _OpenFile:
        """The file, opened or looked at again where it must be; both may hang, so without the lock."""
        now_s = time.monotonic()
        with self._lock:
            file = self._files.get(path)
        if file is not None and now_s - file.checked_s >= RECHECK_S:
            # Gone or replaced: what is there now is opened, or its error raised, at once and next time.
            self.forget(path)
            if _identity(os.stat(path)) == file.identity:
                file.checked_s = now_s
            else:
                file = None
        if file is None:
            file = self._open(path, now_s)
        with self._lock:
            self._files[path] = file
            self._files.move_to_end(path)
            while len(self._files) > self._max_open:
                self._files.popitem(last=False)
        return file

    def _open(self, path: str, now_s: float) -> _OpenFile:
        try:
            descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
        except OSError as error:
            if error.errno not in _TOO_MANY or not self._files:
                raise
            # Others in this process need them more.
            with self._lock:
                self._files.clear()
            descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
        return _OpenFile(descriptor, _identity(os.fstat(descriptor)), now_s)


def _identity(found: os.stat_result) -> tuple[int, int, int, int]:
    return found.st_dev, found.st_ino, found.st_size, found.st_mtime_ns
