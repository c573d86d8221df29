"""The folder of a shard set: the only way to its files, on whatever file system it is.

A shard set may come from anyone. Names that it states are those of files inside its folder: what leads out of
it, by its name or by a link, is refused.
"""

import os
import stat
from collections.abc import Callable, Iterable, Sequence
from threading import Event
from typing import Any

import fsspec  # type: ignore[import-untyped]
from fsspec.core import url_to_fs  # type: ignore[import-untyped]
from fsspec.registry import known_implementations  # type: ignore[import-untyped]

from k25_train.data.open_files import OpenFiles
from k25_train.data.storage.attempts import (
    ChangedFileError,
    FailedAttemptsError,
    attempt,
    delays_at_start,
    delays_in_use,
    describe,
)
from k25_train.data.storage.deadline import Deadline
from k25_train.data.storage.fsspec_files import FsspecFiles, attempt_once, options_of, protocols
from k25_train.data.storage.options import read_options
from k25_train.data.storage.ranges import Range
from k25_train.data.storage.stamps import Version
from k25_train.errors import DataError

PART_BYTES = 2**26
"""Of a whole file in one read: the limit on a read's time is meant for something of this size."""


DelaysOf = Callable[[Exception], Sequence[float]]
_BRING_BACK = (
    "Bring it back, or point data.dir at where the shard set is now, and start again; `python -m "
    "k25_train.data verify` checks all of it."
)
_CREDENTIALS = (
    "The store refuses these credentials: set AWS_PROFILE, or AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, "
    "on every node, and allow them to read and list the bucket."
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
        self._is_local = "file" in protocols(self._fs)
        options = read_options()
        self._deadline = Deadline(options.timeout_s)
        self._files = OpenFiles()
        self._objects = FsspecFiles(self._fs, options)
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
            self._deadline.run(lambda: self._check_local(text))
        return text

    def read(self, name: str) -> bytes:
        """All of a file, at the start. Raises DataError if it is not there or cannot be read."""
        size = self.num_bytes(name)
        starts = range(0, size, PART_BYTES)
        parts = [
            self._attempt(name, start, min(PART_BYTES, size - start), delays_at_start) for start in starts
        ]
        return parts[0] if len(parts) == 1 else b"".join(parts)

    def read_range(self, name: str, offset: int, num_bytes: int) -> bytes:
        """`num_bytes` of a file from `offset`, fewer if it ends before.

        A file system that fails is asked again for up to a minute, one that does not answer within
        `data.read_timeout_s` twice; then raises DataError.
        """
        if self._is_local:
            # What the kernel has in memory is read without another thread.
            data = self._files.read_cached(f"{self._root}/{name}", offset, num_bytes)
            if data is not None:
                return data
        return self._attempt(name, offset, num_bytes, delays_in_use)

    def expect(self, indexed: Callable[[str], Version | None]) -> None:
        """Read objects at a URL in the version that an index has of them; `indexed` says it by the name of
        the file. Reading one that has changed since raises DataError."""
        start = len(self._root) + 1
        self._objects.expect(lambda path: indexed(path[start:]))

    def plan(self, ranges: Iterable[Range]) -> None:
        """Say what will be read next: of an object store, small neighbours come with one
        request."""
        if not self._is_local:
            self._objects.plan(each._replace(name=f"{self._root}/{each.name}") for each in ranges)

    def num_bytes(self, name: str) -> int:
        """Size of a file, at the start. Raises DataError if it is not there."""
        size_of = os.path.getsize if self._is_local else self._objects.num_bytes
        return int(self._tried(name, "", lambda path: size_of(path), delays_at_start))

    def _attempt(self, name: str, offset: int, num_bytes: int, delays_of: DelaysOf) -> bytes:
        read = self._files.read if self._is_local else self._objects.read
        what = f", bytes {offset} to {offset + num_bytes}"
        return bytes(self._tried(name, what, lambda path: read(path, offset, num_bytes), delays_of))

    def _tried(self, name: str, what: str, read: Callable[[str], Any], delays_of: DelaysOf) -> Any:
        path = f"{self._root}/{name}"
        try:
            return attempt(lambda: read(path), self.path(name), delays_of, self._deadline, self._closing)
        except FailedAttemptsError as failed:
            raise self._failure(name, what, failed.error, failed.num_attempts) from failed.error

    def _failure(self, name: str, what: str, error: Exception, num_attempts: int) -> DataError:
        tried = f" after {num_attempts} attempts" if num_attempts > 1 else ""
        if isinstance(error, FileNotFoundError):
            where = "" if self._is_local else " (or no such bucket)"
            return MissingFileError(f"{self.path(name)}: no such file{where}{tried}. {_BRING_BACK}")
        if isinstance(error, ChangedFileError):
            return DataError(
                f"{self.path(name)}: {error}. Objects of a data set must not be written while it trains: "
                "bring the old one back, or index the new one (`python -m k25_train.data index`) and start "
                "again."
            )
        problem = f"cannot be read{tried} ({describe(error)}){what}"
        is_refused = not self._is_local and (
            isinstance(error, PermissionError) or "Credentials" in repr(error)
        )
        remedy = _CREDENTIALS if is_refused else _BRING_BACK
        return DataError(f"{self.path(name)}: {problem}. {remedy}")

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
        fs, place = url_to_fs(url, **options_of(url, read_options().timeout_s))
        attempt_once(fs)
    except ImportError as error:
        raise DataError(
            f"{key}={url}: {error}. Install that package with pip, or copy the data to a local folder."
        ) from error
    except Exception as error:  # each file system checks its URLs in its own way
        raise DataError(
            f"{key}={url}: cannot be opened ({describe(error)}). Use a local path or a URL that fsspec knows."
        ) from error
    return fs, str(place)
