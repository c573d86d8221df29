"""Files on file systems of fsspec that are not local: ranged requests, one version of each object.

Sources: s3fs 2026.9 (`core.py`, `errors.py`), botocore 1.43. Both try again by themselves, five times each,
the one around the other; here each makes one attempt, and `attempts.py` decides.
"""

import time
from collections.abc import Iterable
from typing import Any

import fsspec  # type: ignore[import-untyped]
from fsspec.asyn import sync  # type: ignore[import-untyped]

from k25_train.data.byte_cache import ByteCache
from k25_train.data.storage.attempts import ChangedFileError, refusal
from k25_train.data.storage.counts import COUNTS
from k25_train.data.storage.options import ReadOptions
from k25_train.data.storage.ranges import Range, coalesce

HELD_BYTES = 2**26
"""Of ranges that were read together, until they are asked for or give way to others. Our choice."""
RECHECK_S = 60.0
"""How long an object counts as unchanged where requests cannot say which version they want. Our choice."""


class _Version:
    """An object as it was first seen."""

    def __init__(self, num_bytes: int, stamp: str) -> None:
        self.num_bytes = num_bytes
        self.stamp = stamp
        self.checked_s = time.monotonic()


class FsspecFiles:
    """Reads objects of one file system. Safe across threads."""

    def __init__(self, fs: Any, options: ReadOptions) -> None:
        self._fs = fs
        self._options = options
        self._is_s3 = "s3" in protocols(fs)
        self._versions: dict[str, _Version] = {}
        self._held: ByteCache[bytes] = ByteCache(HELD_BYTES, len)
        self._held_ranges: dict[str, list[Range]] = {}

    def num_bytes(self, path: str) -> int:
        """Size of an object."""
        return self._version(path).num_bytes

    def stamp(self, path: str) -> str:
        """What says that an object is the same: its ETag or, where there is none, its time of change."""
        return self._version(path).stamp

    def read(self, path: str, offset: int, num_bytes: int) -> bytes:
        """`num_bytes` from `offset`, fewer if the object ends before.

        Raises `ChangedFileError` if it is not what it was when it was first read, and what the file system
        does.
        """
        for held in self._held_ranges.get(path, ()):
            if held.start <= offset and offset + num_bytes <= held.stop:
                data = self._held.get(held, lambda held=held: self._through_cache(*held))  # type: ignore[misc]
                return data[offset - held.start :][:num_bytes]
        return self._through_cache(path, offset, offset + num_bytes)

    def plan(self, ranges: Iterable[Range]) -> None:
        """Say what will be read next: neighbours come with one request, when the first is asked for."""
        self._held.clear()
        self._held_ranges = {}
        wanted = set(ranges)
        for each in coalesce(wanted):
            if each not in wanted:
                self._held_ranges.setdefault(each.name, []).append(each)

    def _through_cache(self, path: str, start: int, stop: int) -> bytes:
        version = self._version(path)
        file = f"{self._fs.unstrip_protocol(path)} {version.num_bytes} {version.stamp}"

        def fetch(first: int, last: int) -> bytes:
            return self._fetch(path, version, first, last)

        return self._options.cache.read(file, start, stop - start, version.num_bytes, fetch)

    def _fetch(self, path: str, version: _Version, start: int, stop: int) -> bytes:
        self._options.rate.wait()
        COUNTS.add("requests")
        data = (
            self._fetch_s3(path, version, start, stop) if self._is_s3 else self._fetch_any(path, start, stop)
        )
        if len(data) != stop - start:
            raise ConnectionError(f"{len(data)} of {stop - start} bytes came")
        return data

    def _fetch_any(self, path: str, start: int, stop: int) -> bytes:
        data = bytes(self._fs.cat_file(path, start=start, end=stop))
        version = self._versions[path]
        if time.monotonic() - version.checked_s > RECHECK_S:
            self._check_same(path, version, self._look(path))
        return data

    def _fetch_s3(self, path: str, version: _Version, start: int, stop: int) -> bytes:
        bucket, key, object_version = self._fs.split_path(path)
        more = {"VersionId": object_version} if object_version else {}

        async def get() -> bytes:
            found = await self._fs._call_s3(
                "get_object",
                Bucket=bucket,
                Key=key,
                Range=f"bytes={start}-{stop - 1}",
                IfMatch=version.stamp,
                **more,
            )
            async with found["Body"] as body:
                return bytes(await body.read())

        try:
            data: bytes = sync(self._fs.loop, get)
        except OSError as error:
            if refusal(error) in ("PreconditionFailed", "412", "InvalidRange", "416"):
                self._check_same(path, version, self._look(path))
            raise
        return data

    def _version(self, path: str) -> _Version:
        if path not in self._versions:
            self._versions[path] = self._look(path)
        return self._versions[path]

    def _look(self, path: str) -> _Version:
        self._options.rate.wait()
        COUNTS.add("requests")
        found = self._fs.info(path, refresh=True) if self._is_s3 else self._fs.info(path)
        if found["type"] != "file":
            raise IsADirectoryError(f"{path} is no object")
        stamps = (found.get(name) for name in ("ETag", "etag", "LastModified", "mtime", "updated", "created"))
        return _Version(int(found["size"]), str(next((stamp for stamp in stamps if stamp), "")))

    @staticmethod
    def _check_same(path: str, before: _Version, now: _Version) -> None:
        before.checked_s = now.checked_s
        if (before.num_bytes, before.stamp) != (now.num_bytes, now.stamp):
            raise ChangedFileError(
                f"it has changed since this run opened it: it had {before.num_bytes} bytes ({before.stamp}) "
                f"and has {now.num_bytes} ({now.stamp})"
            )


def options_of(url: str, timeout_s: float) -> dict[str, Any]:
    """Arguments of fsspec for a URL: none but for S3, which is to make one attempt in the time of a read."""
    if not url.startswith(("s3://", "s3a://")):
        return {}
    given = fsspec.config.conf.get("s3", {}).get("config_kwargs", {})
    once = {"retries": {"total_max_attempts": 1}, "connect_timeout": timeout_s, "read_timeout": timeout_s}
    return {"config_kwargs": once | given}


def attempt_once(fs: Any) -> None:
    """Switch off what the file system tries by itself."""
    if "s3" in protocols(fs):
        fs.retries = 1


def protocols(fs: Any) -> tuple[str, ...]:
    """Names of a file system."""
    return (fs.protocol,) if isinstance(fs.protocol, str) else tuple(fs.protocol)
