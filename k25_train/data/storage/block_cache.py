"""Blocks of remote files on a node's own disk, shared by all its processes.

fsspec's own caches do not fit (2026.9): `simplecache` and `filecache` keep whole files, shards of GBs for a
sample of KBs, and none of them has a limit on its size; `blockcache` keeps its map of blocks per process and
rewrites it when a file is closed.

    <folder>/<2 digits>/<key>-<block>   CRC-32 of the rest, then a block of a file of one identity
    <folder>/used                       bytes of all blocks, about; locked while it is changed

A block is written under another name and renamed: it is there whole or not at all. One that a crash of the
node has damaged fails its checksum and is fetched again. A file that changes has another key, so bytes of two
versions never mix.
"""

import errno
import fcntl
import hashlib
import logging
import os
import struct
import time
import zlib
from collections.abc import Callable
from pathlib import Path

from k25_train.data.storage.counts import COUNTS

logger = logging.getLogger(__name__)

BLOCK_BYTES = 2**20
"""Of a file, in one piece. Our choice: fetching as much takes about as long as asking for it."""
KEPT = 0.9
"""Share of the limit that is kept when the oldest blocks are removed. Our choice."""
_TOUCH_S = 600.0
"""A block's time of last use is exact to this: writing it costs more than reading a small sample."""
_CRC = struct.Struct("<I")
_COUNT = struct.Struct("<q")
_NO_ROOM = (errno.ENOSPC, errno.EDQUOT)


class BlockCache:
    """Serves ranges of files in blocks; keeps those used last. Safe across processes."""

    def __init__(self, folder: Path, max_bytes: int) -> None:
        """Makes `folder`. Raises OSError if it cannot be written to."""
        self._folder = folder
        self._max_bytes = max_bytes
        self._warned = False
        folder.mkdir(parents=True, exist_ok=True)
        self._change_used(0)

    def read(
        self, file: str, offset: int, num_bytes: int, file_bytes: int, fetch: Callable[[int, int], bytes]
    ) -> bytes:
        """`num_bytes` of a file from `offset`, fewer if it ends before.

        Args:
            file: names the file and its version.
            file_bytes: how many it has.
            fetch: gives bytes from a start to a stop; neighbouring missing blocks are fetched at once.
        """
        stop = min(offset + num_bytes, file_bytes)
        if offset >= stop:
            return b""
        numbers = range(offset // BLOCK_BYTES, -(-stop // BLOCK_BYTES))
        paths = {number: self._path(file, number) for number in numbers}
        blocks = {number: self._load(path) for number, path in paths.items()}
        missing = [number for number in numbers if blocks[number] is None]
        COUNTS.add("cache_hits", len(numbers) - len(missing))
        COUNTS.add("cache_misses", len(missing))
        for run in _runs(missing):
            start = run.start * BLOCK_BYTES
            data = fetch(start, min(run.stop * BLOCK_BYTES, file_bytes))
            for number in run:
                blocks[number] = data[number * BLOCK_BYTES - start :][:BLOCK_BYTES]
                self._keep(paths[number], blocks[number] or b"")
        first = numbers.start * BLOCK_BYTES
        return b"".join(blocks[number] or b"" for number in numbers)[offset - first : stop - first]

    def _path(self, file: str, number: int) -> Path:
        key = hashlib.sha256(file.encode()).hexdigest()[:40]
        return self._folder / key[:2] / f"{key}-{number}"

    def _load(self, path: Path) -> bytes | None:
        try:
            data = path.read_bytes()
            if len(data) < _CRC.size or zlib.crc32(data[_CRC.size :]) != _CRC.unpack_from(data)[0]:
                path.unlink(missing_ok=True)
                return None
            if time.time() - path.stat().st_mtime > _TOUCH_S:
                os.utime(path)
        except OSError:  # it is not there, or was removed meanwhile
            return None
        return data[_CRC.size :]

    def _keep(self, path: Path, block: bytes) -> None:
        partial = path.with_name(f"{path.name}.{os.getpid()}.partial")
        try:
            path.parent.mkdir(exist_ok=True)
            partial.write_bytes(_CRC.pack(zlib.crc32(block)) + block)
            partial.rename(path)
            used = self._change_used(len(block) + _CRC.size)
        except OSError as error:
            # What was fetched can be used all the same.
            partial.unlink(missing_ok=True)
            if error.errno in _NO_ROOM:
                self.evict()
            elif not self._warned:
                logger.warning("data.cache_dir=%s cannot be written to (%s); reading without", path, error)
                self._warned = True
            return
        if used > self._max_bytes:
            self.evict()

    def evict(self) -> None:
        """Remove the blocks that were used longest ago, and what writers that died have left, until `KEPT` of
        the limit is left. Whoever finds another doing so leaves it to that."""
        descriptor = os.open(self._folder / "evicting", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            os.close(descriptor)
            return
        try:
            self._remove_oldest()
        finally:
            os.close(descriptor)

    def _remove_oldest(self) -> None:
        found: list[tuple[float, int, str]] = []
        for folder in (entry for entry in os.scandir(self._folder) if entry.is_dir()):
            for entry in os.scandir(folder.path):
                try:
                    stat = entry.stat()
                except FileNotFoundError:
                    continue
                found.append((stat.st_mtime, stat.st_size, entry.path))
        used = sum(size for _, size, _ in found)
        for _, size, path in sorted(found):
            if used <= KEPT * self._max_bytes:
                break
            Path(path).unlink(missing_ok=True)
            used -= size
        self._change_used(used, absolute=True)

    def _change_used(self, change: int, absolute: bool = False) -> int:
        descriptor = os.open(self._folder / "used", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX)
            data = os.pread(descriptor, _COUNT.size, 0)
            before = _COUNT.unpack(data)[0] if len(data) == _COUNT.size and not absolute else 0
            os.pwrite(descriptor, _COUNT.pack(before + change), 0)
            return int(before + change)
        finally:
            os.close(descriptor)


class NoCache:
    """The do-nothing twin: every range is fetched."""

    def read(
        self, file: str, offset: int, num_bytes: int, file_bytes: int, fetch: Callable[[int, int], bytes]
    ) -> bytes:
        """See `BlockCache`."""
        stop = min(offset + num_bytes, file_bytes)
        return fetch(offset, stop) if offset < stop else b""


def _runs(numbers: list[int]) -> list[range]:
    """Numbers in ascending order as ranges without gaps."""
    runs: list[range] = []
    for number in numbers:
        if runs and runs[-1].stop == number:
            runs[-1] = range(runs[-1].start, number + 1)
        else:
            runs.append(range(number, number + 1))
    return runs
