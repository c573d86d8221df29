"""The folder of a shard set: the only way to its files, on whatever file system it is.

A shard set may come from anyone. Names that it states are those of files inside its folder: what leads out of
it, by its name or by a link, is refused.
"""

import errno
import logging
import os
import stat
from collections.abc import Callable, Sequence
from threading import Event
from typing import Any

import fsspec  # type: ignore[import-untyped]
from fsspec.core import url_to_fs  # type: ignore[import-untyped]
from fsspec.registry import known_implementations  # type: ignore[import-untyped]

from k25_train.data.open_files import OpenFiles
from k25_train.errors import DataError

logger = logging.getLogger(__name__)

RETRY_DELAYS_S: Sequence[float] = (1, 2, 4, 8, 15, 30)
"""Waits between attempts to read: a file system that fails over, or a stale handle, is back within a minute.
Our choice; shorter than any sensible `train.stall_timeout_s`."""
GONE_DELAYS_S: Sequence[float] = (1, 2, 4, 8)
"""The same where what was there when the run began is gone or may no longer be read, which seldom passes."""
_GONE = (FileNotFoundError, NotADirectoryError, IsADirectoryError, PermissionError)
_PASSING = (TimeoutError, ConnectionError, BlockingIOError, InterruptedError)
_PASSING_NUMBERS = frozenset(
    {
        errno.EIO,
        errno.ESTALE,
        errno.EBUSY,
        errno.EREMOTEIO,
        errno.ENETDOWN,
        errno.ENETUNREACH,
        errno.EHOSTDOWN,
    }
    | {errno.EHOSTUNREACH, errno.ENOTCONN, errno.ENFILE, errno.EMFILE, errno.ENOMEM}
)


class MissingFileError(DataError):
    """A file is not there."""


class DataFolder:
    """Reads files of one folder, local or at any fsspec URL.

    Safe across threads and forks. Local files stay open between reads of a range; on an object store each is
    one request.
    """

    def __init__(self, directory: str) -> None:
        """Raises DataError if `directory` is a URL of a kind that is unknown, or whose package is missing."""
        self.directory = directory
        self._fs, self._root = locate(directory, "data.dir")
        self._is_local = "file" in _protocols(self._fs)
        self._read_at = OpenFiles().read if self._is_local else self._request
        self._closing = Event()

    def close(self) -> None:
        """Make a read that waits to try again fail at once."""
        self._closing.set()

    def path(self, name: str) -> str:
        """The file's full name, for messages and for `read_file`."""
        return f"{self.directory}/{name}"

    def check_name(self, name: object) -> str:
        """The name, if it is that of a regular file inside the folder, or of none at all.

        Raises DataError, naming it, if it leads elsewhere: absolute, with `..`, a URL, a link that leaves the
        folder, or something that is no file.
        """
        parts = name.split("/") if isinstance(name, str) else []
        text = str(name)
        if (
            not parts
            or set(parts) & {"", ".", ".."}
            or "::" in text
            or "\\" in text
            or not text.isprintable()
        ):
            raise DataError(
                f"{self.directory}: names a file {name!r}; a shard set names files in its folder, without "
                "`..`, `\\`, URLs or control characters. Do not use this set, or correct its dataset.json."
            )
        if self._is_local:
            self._check_local(text)
        return text

    def read(self, name: str) -> bytes:
        """All of a file, at the start. Raises DataError if it is not there or cannot be read."""
        return bytes(self._attempt(name, lambda path: self._fs.cat_file(path), _delays_at_start))

    def read_range(self, name: str, offset: int, num_bytes: int) -> bytes:
        """`num_bytes` of a file from `offset`, fewer if it ends before.

        A file system that fails is asked again for up to a minute; then raises DataError.
        """
        read_at = self._read_at
        return bytes(self._attempt(name, lambda path: read_at(path, offset, num_bytes), _delays_in_use))

    def num_bytes(self, name: str) -> int:
        """Size of a file, at the start. Raises DataError if it is not there."""
        return int(self._attempt(name, self._fs.size, _delays_at_start))

    def _request(self, path: str, offset: int, num_bytes: int) -> bytes:
        return bytes(self._fs.cat_file(path, start=offset, end=offset + num_bytes))

    def _attempt(
        self, name: str, read: Callable[[str], Any], delays_of: Callable[[Exception], Sequence[float]]
    ) -> Any:
        attempt = 0
        while True:
            try:
                return read(f"{self._root}/{name}")
            except Exception as error:  # file systems of fsspec raise what their libraries do
                delays_s = delays_of(error)
                if attempt >= len(delays_s) or self._closing.is_set():
                    raise self._failure(name, error, attempt + 1) from error
                logger.warning(
                    "%s: %s; trying again in %g s (%d of %d)",
                    self.path(name),
                    describe(error),
                    delays_s[attempt],
                    attempt + 1,
                    len(delays_s),
                )
                self._closing.wait(delays_s[attempt])
                attempt += 1

    def _failure(self, name: str, error: Exception, num_attempts: int) -> DataError:
        tried = f" after {num_attempts} attempts" if num_attempts > 1 else ""
        is_missing = isinstance(error, FileNotFoundError)
        what = f"no such file{tried}" if is_missing else f"cannot be read{tried} ({describe(error)})"
        return (MissingFileError if is_missing else DataError)(
            f"{self.path(name)}: {what}. Bring it back, or point data.dir at where the shard set is now, and "
            "start again; `python -m k25_train.data verify` checks all of it."
        )

    def _check_local(self, name: str) -> None:
        path = f"{self._root}/{name}"
        real = os.path.realpath(path)
        root = os.path.realpath(self._root)
        if os.path.commonpath([real, root]) != root:
            raise DataError(
                f"{self.path(name)}: is a link to {real}, outside of its shard set. Copy the file into the "
                "folder if you trust it, or point data.dir at the folder that the links lead to."
            )
        try:
            is_file = stat.S_ISREG(os.stat(path).st_mode)
        except OSError:
            return  # reading it says what is wrong
        if not is_file:
            raise DataError(f"{self.path(name)}: is no regular file. Do not use this set, or build it again.")


def read_file(path: str, what: str, key: str) -> bytes:
    """All of a file at a path or any fsspec URL.

    Raises DataError naming it, `what` it is and the configuration's `key` for it, if it cannot be read.
    """
    fs, place = locate(path, key)
    try:
        return bytes(fs.cat_file(place))
    except Exception as error:  # as in DataFolder
        is_missing = isinstance(error, FileNotFoundError)
        problem = f"no such {what} file" if is_missing else f"this {what} cannot be read ({describe(error)})"
        raise DataError(f"{path}: {problem}. Set {key}, or build the shard set.") from error


def locate(url: str, key: str) -> tuple[Any, str]:
    """The fsspec file system of a path or URL, and the path within it.

    Raises DataError, naming the configuration's `key`, for a URL that no installed package can open.
    """
    if "\0" in url:
        raise DataError(f"{key}={url!r}: has a NUL byte, which no path has. Correct it.")
    # A name with "::" may be that of a local folder; fsspec takes it for a chain of file systems.
    if "://" not in url and ("::" not in url or os.path.lexists(url)):
        return fsspec.filesystem("file"), os.path.abspath(os.path.expanduser(url))
    for link in url.split("::"):
        protocol = link.partition("://")[0]
        if protocol not in known_implementations and "://" not in link:
            raise DataError(
                f"{key}={url}: there is no such folder, and as a chain of file systems {protocol!r} is none "
                "that fsspec knows. Correct the path."
            )
    try:
        fs, place = url_to_fs(url)
    except ImportError as error:
        raise DataError(
            f"{key}={url}: {error}. Install that package with pip, or copy the data to a local folder."
        ) from error
    except Exception as error:  # each file system checks its URLs in its own way
        raise DataError(
            f"{key}={url}: cannot be opened ({describe(error)}). Use a local path or a URL that fsspec knows."
        ) from error
    return fs, str(place)


def describe(error: BaseException) -> str:
    """An error in a few words: what the system says and its number, or type and text."""
    number = getattr(error, "errno", None)
    if isinstance(number, int) and number in errno.errorcode:
        return f"{os.strerror(number)}, {errno.errorcode[number]}"
    return f"{type(error).__name__}: {error}" if str(error) else type(error).__name__


def _delays_at_start(error: Exception) -> Sequence[float]:
    # What is wrong at the start is most likely a setting, and somebody is looking.
    passes = isinstance(error, _PASSING) or getattr(error, "errno", None) in _PASSING_NUMBERS
    return RETRY_DELAYS_S if passes else ()


def _delays_in_use(error: Exception) -> Sequence[float]:
    return GONE_DELAYS_S if isinstance(error, _GONE) else RETRY_DELAYS_S


def _protocols(fs: Any) -> tuple[str, ...]:
    return (fs.protocol,) if isinstance(fs.protocol, str) else tuple(fs.protocol)
