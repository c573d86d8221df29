"""Files on file systems of fsspec that are not local: ranged requests, one version of each object.

Sources: s3fs 2026.9 (`core.py`, `errors.py`), botocore 1.43. Both try again by themselves, five times each,
the one around the other; here each makes one attempt, and `attempts.py` decides.
"""

import time
from collections.abc import Callable, Iterable
from typing import Any

import fsspec  # type: ignore[import-untyped]
from fsspec.asyn import sync  # type: ignore[import-untyped]

from k25_train.data.byte_cache import ByteCache
from k25_train.data.storage.attempts import ChangedFileError, refusal
from k25_train.data.storage.counts import COUNTS
from k25_train.data.storage.options import ReadOptions
from k25_train.data.storage.ranges import GAP_BYTES, Range, coalesce
from k25_train.data.storage.stamps import Version, version_of

HELD_BYTES = 2**26
"""Of ranges that were read together, until they are asked for or give way to others. Our choice."""
RECHECK_S = 60.0
"""How long an object counts as unchanged where requests cannot say which version they want. Our choice."""


class _Object:
    """An object in the version that is read."""

    def __init__(self, version: Version, since: str) -> None:
        self.version = version
        self.since = since
        """When it was this version, to continue "it has changed since"."""
        self.checked_s = time.monotonic()


def unknown(path: str) -> Version | None:
    """Of objects that no index knows: the version that is found first is read."""
    return None


class FsspecFiles:
    """Reads objects of one file system. Safe across threads."""

    def __init__(self, fs: Any, options: ReadOptions) -> None:
        self._fs = fs
        self._options = options
        self._is_s3 = "s3" in protocols(fs)
        self._indexed: Callable[[str], Version | None] = unknown
        self._objects: dict[str, _Object] = {}
        self._held: ByteCache[bytes] = ByteCache(HELD_BYTES, len)
        self._held_ranges: dict[str, list[Range]] = {}

    def expect(self, indexed: Callable[[str], Version | None]) -> None:
        """Read objects in the version that an index has of them, which `indexed` says by their paths.

        Where requests can name a version that costs none; elsewhere an object is looked at when it is read
        first, as it is without an index.
        """
        self._indexed = indexed

    def num_bytes(self, path: str) -> int:
        """Size of an object."""
        return self._object(path).version.num_bytes

    def read(self, path: str, offset: int, num_bytes: int) -> bytes:
        """`num_bytes` from `offset`, fewer if the object ends before.

        Raises `ChangedFileError` if it is not what it was when it was indexed or first read, and what the
        file system does.
        """
        for held in self._held_ranges.get(path, ()):
            if held.start <= offset and offset + num_bytes <= held.stop:
                data = self._held.get(held, lambda held=held: self._through_cache(*held))  # type: ignore[misc]
                return data[offset - held.start :][:num_bytes]
        return self._through_cache(path, offset, offset + num_bytes)

    def plan(self, ranges: Iterable[Range]) -> None:
        """Say what will be read next: small neighbours come with one request, when the first is asked for."""
        # Larger ones are worth a request each, and often only a part of them is read.
        wanted = {each for each in ranges if each.stop - each.start <= GAP_BYTES}
        together: dict[str, list[Range]] = {}
        for each in coalesce(wanted):
            if each not in wanted:
                together.setdefault(each.name, []).append(each)
        self._held.clear()
        self._held_ranges = together

    def _through_cache(self, path: str, start: int, stop: int) -> bytes:
        found = self._object(path)
        num_bytes, stamp = found.version
        file = f"{self._fs.unstrip_protocol(path)} {num_bytes} {stamp}"

        def fetch(first: int, last: int) -> bytes:
            return self._fetch(path, found, first, last)

        return self._options.cache.read(file, start, stop - start, num_bytes, fetch)

    def _fetch(self, path: str, found: _Object, start: int, stop: int) -> bytes:
        self._options.rate.wait()
        COUNTS.add("requests")
        fetch = self._fetch_s3 if self._is_s3 else self._fetch_any
        data = fetch(path, found, start, stop)
        if len(data) != stop - start:
            raise ConnectionError(f"{len(data)} of {stop - start} bytes came")
        return data

    def _fetch_any(self, path: str, found: _Object, start: int, stop: int) -> bytes:
        data = bytes(self._fs.cat_file(path, start=start, end=stop))
        if time.monotonic() - found.checked_s > RECHECK_S:
            self._check(path, found)
        return data

    def _fetch_s3(self, path: str, found: _Object, start: int, stop: int) -> bytes:
        bucket, key, object_version = self._fs.split_path(path)
        more = {"VersionId": object_version} if object_version else {}

        async def get() -> bytes:
            answer = await self._fs._call_s3(
                "get_object",
                Bucket=bucket,
                Key=key,
                Range=f"bytes={start}-{stop - 1}",
                IfMatch=found.version.etag,
                **more,
            )
            async with answer["Body"] as body:
                return bytes(await body.read())

        try:
            data: bytes = sync(self._fs.loop, get)
        except OSError as error:
            if refusal(error) in ("PreconditionFailed", "412", "InvalidRange", "416"):
                self._check(path, found)
            raise
        return data

    def _object(self, path: str) -> _Object:
        if path not in self._objects:
            self._objects[path] = self._open(path)
        return self._objects[path]

    def _open(self, path: str) -> _Object:
        indexed = self._indexed(path)
        if indexed is None:
            return _Object(self._look(path), "this run opened it")
        found = _Object(indexed, "it was indexed")
        if not (self._is_s3 and indexed.etag):
            # Of an index that knows sizes only, the stamp is the one of now.
            found.version = self._check(path, found)
        return found

    def _look(self, path: str) -> Version:
        self._options.rate.wait()
        COUNTS.add("requests")
        found = self._fs.info(path, refresh=True) if self._is_s3 else self._fs.info(path)
        if found["type"] != "file":
            raise IsADirectoryError(f"{path} is no object")
        return version_of(found)

    def _check(self, path: str, found: _Object) -> Version:
        now = self._look(path)
        found.checked_s = time.monotonic()
        if not found.version.is_same(now):
            raise ChangedFileError(
                f"it has changed since {found.since}: it had {found.version} and has {now}"
            )
        return now


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
