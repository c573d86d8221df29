"""Deadlines, attempts, the cache on local disk, the rate of requests, and neighbouring ranges."""

import errno
import multiprocessing
import os
import threading
import time
import weakref
from collections.abc import Callable
from pathlib import Path

import pytest

from k25_train.data.folder import DataFolder
from k25_train.data.open_files import OpenFiles
from k25_train.data.storage import attempts, options
from k25_train.data.storage.attempts import FailedAttemptsError, attempt, delays_at_start, delays_in_use
from k25_train.data.storage.block_cache import BLOCK_BYTES, BlockCache, NoCache
from k25_train.data.storage.counts import COUNTS
from k25_train.data.storage.deadline import Deadline, HungReadError
from k25_train.data.storage.options import ReadOptions
from k25_train.data.storage.ranges import Range, coalesce
from k25_train.data.storage.request_rate import NoLimit, RequestRate
from k25_train.errors import DataError


def test_a_call_that_hangs_is_given_up_and_the_next_one_is_not_held_up() -> None:
    deadline, never = Deadline(0.05), threading.Event()
    assert deadline.run(lambda: 1) == 1
    before, started_s = threading.active_count(), time.monotonic()
    with pytest.raises(HungReadError, match=r"data\.read_timeout_s=0\.05 s"):
        deadline.run(never.wait)
    assert time.monotonic() - started_s < 10
    assert deadline.run(lambda: 2) == 2
    with pytest.raises(KeyError):
        deadline.run(lambda: {}["missing"])
    never.set()
    time.sleep(0.05)
    assert threading.active_count() == before


def test_a_hung_read_names_file_place_and_seconds(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As over a mount whose server is gone; another file can still be read meanwhile."""
    never, read = threading.Event(), OpenFiles.read
    monkeypatch.setattr(attempts, "HUNG_DELAYS_S", (0.0, 0.0))
    monkeypatch.setattr(options, "_options", ReadOptions(0.05, NoCache(), NoLimit()))
    for name in ("dead.tar", "live.tar"):
        (tmp_path / name).write_bytes(b"content")

    def hangs(files: OpenFiles, path: str, offset: int, num_bytes: int) -> bytes:
        if "dead" in path:
            never.wait()
        return read(files, path, offset, num_bytes)

    monkeypatch.setattr(OpenFiles, "read", hangs)
    folder = DataFolder(str(tmp_path))
    told = r"dead\.tar: cannot be read after 3 attempts \(HungReadError: .*=0\.05 s\), bytes 2 to 5"
    with pytest.raises(DataError, match=told):
        folder.read_range("dead.tar", 2, 3)
    assert folder.read_range("live.tar", 0, 7) == b"content"
    never.set()


def test_a_file_in_memory_is_read_without_a_thread(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "a").write_bytes(b"0123456789")
    folder = DataFolder(str(tmp_path))
    assert folder.read_range("a", 0, 4) == b"0123"
    if folder._files.read_cached(f"{tmp_path}/a", 2, 3) is None:
        pytest.skip("this file system cannot tell what is in memory")
    monkeypatch.setattr(folder._deadline, "run", lambda call: pytest.fail("a thread was asked"))
    assert folder.read_range("a", 2, 3) == b"234"


def test_waits_are_longer_by_chance_and_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    waited: list[float] = []

    class Closing(threading.Event):
        def wait(self, timeout: float | None = None) -> bool:
            waited.append(timeout or 0.0)
            return False

    def refused() -> bytes:
        raise OSError(errno.EBUSY, "reduce your request rate")

    with pytest.raises(FailedAttemptsError):
        attempt(refused, "x", delays_in_use, Deadline(10), Closing())
    assert len(waited) == len(attempts.RETRY_DELAYS_S)
    for found, delay_s in zip(waited, attempts.RETRY_DELAYS_S, strict=True):
        assert delay_s <= found <= delay_s * (1 + attempts.JITTER)
    assert waited != list(attempts.RETRY_DELAYS_S)


class ClientError(Exception):
    """As botocore's."""

    def __init__(self, status: int) -> None:
        super().__init__(str(status))
        self.response = {"ResponseMetadata": {"HTTPStatusCode": status}, "Error": {"Code": "X"}}


def test_what_passes_by_itself_is_told_from_what_is_set_wrong() -> None:
    for status in (429, 500, 503):
        assert delays_at_start(ClientError(status))
    for status in (400, 403, 404):
        assert not delays_at_start(ClientError(status))
    assert delays_at_start(ConnectionResetError())
    assert not delays_at_start(PermissionError(errno.EACCES, "no"))


CONTENT = bytes(range(256)) * (3 * BLOCK_BYTES // 256) + b"end"


def read(cache: BlockCache, offset: int, num_bytes: int, fetched: list[tuple[int, int]]) -> bytes:
    def fetch(start: int, stop: int) -> bytes:
        fetched.append((start, stop))
        return CONTENT[start:stop]

    return cache.read("s3://b/a 1 etag", offset, num_bytes, len(CONTENT), fetch)


def test_the_cache_gives_what_the_store_does_and_asks_it_once(tmp_path: Path) -> None:
    cache, fetched = BlockCache(tmp_path, 2**30), list[tuple[int, int]]()
    places = [
        (0, 5),
        (BLOCK_BYTES - 2, 4),
        (0, len(CONTENT)),
        (len(CONTENT) - 1, 99),
        (len(CONTENT), 5),
        (7, 0),
    ]
    for offset, num_bytes in places:
        assert read(cache, offset, num_bytes, fetched) == CONTENT[offset : offset + num_bytes]
    assert fetched == [
        (0, BLOCK_BYTES),
        (BLOCK_BYTES, 2 * BLOCK_BYTES),
        (2 * BLOCK_BYTES, len(CONTENT)),
    ]
    # Another process of the node.
    assert read(BlockCache(tmp_path, 2**30), 0, len(CONTENT), fetched) == CONTENT
    assert len(fetched) == 3


def test_a_damaged_or_torn_block_is_fetched_again(tmp_path: Path) -> None:
    cache, fetched = BlockCache(tmp_path, 2**30), list[tuple[int, int]]()
    read(cache, 0, 10, fetched)
    (block,) = tmp_path.glob("??/*-0")
    for damaged in (block.read_bytes()[:1000], b"", b"\0" * 2000):
        block.write_bytes(damaged)
        assert read(cache, 0, 10, fetched) == CONTENT[:10]
    assert len(fetched) == 4


def test_the_cache_keeps_to_its_limit_and_to_what_was_used_last(tmp_path: Path) -> None:
    cache, fetched = BlockCache(tmp_path, 4 * BLOCK_BYTES), list[tuple[int, int]]()
    (tmp_path / "ab").mkdir()
    left = tmp_path / "ab" / "x-0.1.partial"
    left.write_bytes(b"\0" * BLOCK_BYTES)
    os.utime(left, (0, 0))
    for number in range(8):
        cache.read(f"file {number}", 0, 10, BLOCK_BYTES, lambda start, stop: bytes(stop - start))
        for path in tmp_path.glob("??/*-0"):
            age = 10 * (number + 1) if path.stat().st_mtime > 10**6 else 0
            if age:
                os.utime(path, (age, age))
        sizes = sum(path.stat().st_size for path in tmp_path.glob("??/*"))
        assert sizes <= 5 * (BLOCK_BYTES + 4)
    assert not left.exists()
    del fetched


def test_a_full_disk_costs_speed_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    cache, fetched = BlockCache(tmp_path, 2**30), list[tuple[int, int]]()

    def full(path: Path, data: bytes) -> int:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(Path, "write_bytes", full)
    assert read(cache, 0, 10, fetched) == CONTENT[:10]
    assert read(cache, 0, 10, fetched) == CONTENT[:10]
    assert len(fetched) == 2


def _hammer(folder: Path, failures: "multiprocessing.Queue[str]") -> None:
    cache = BlockCache(folder, 2 * BLOCK_BYTES)
    for number in range(40):
        file = f"file {number % 5}"
        data = cache.read(
            file, 3, 50, BLOCK_BYTES, lambda start, stop, file=file: file.encode() * (stop // 6)
        )
        if data != (file.encode() * 20)[3:53]:
            failures.put(file)


def test_processes_share_a_cache_that_is_too_small(tmp_path: Path) -> None:
    context = multiprocessing.get_context("fork")
    failures = context.Queue()
    processes = [context.Process(target=_hammer, args=(tmp_path, failures)) for _ in range(3)]
    for each in processes:
        each.start()
    for each in processes:
        each.join()
        assert each.exitcode == 0
    assert failures.empty()
    assert not list(tmp_path.glob("??/*.partial"))


def test_processes_of_a_node_share_their_requests(tmp_path: Path) -> None:
    """A bucket: what was not used for a second may be used at once, then it is one by one."""
    slept: list[float] = []
    for _ in range(15):
        # Each as another process would.
        RequestRate(10, tmp_path, slept.append).wait()
    assert 4 <= len(slept) <= 5
    assert slept == sorted(slept)
    assert slept[-1] <= 0.6
    # The file of a boot before is not believed.
    (file,) = tmp_path.iterdir()
    file.write_bytes(b"\0\0\0\0\0\0\xf0\x7f")
    RequestRate(10, tmp_path, pytest.fail).wait()


def test_neighbours_are_read_together() -> None:
    found = coalesce(
        [Range("b", 0, 5), Range("a", 100, 110), Range("a", 0, 10), Range("a", 15, 40), Range("a", 0, 10)],
        gap_bytes=5,
        max_bytes=60,
    )
    assert found == [Range("a", 0, 40), Range("a", 100, 110), Range("b", 0, 5)]
    assert coalesce([Range("a", 0, 50), Range("a", 50, 100)], max_bytes=60) == [
        Range("a", 0, 50),
        Range("a", 50, 100),
    ]
    assert coalesce([Range("a", 0, 50), Range("a", 10, 20)]) == [Range("a", 0, 50)]


def test_counts_are_told_once() -> None:
    COUNTS.take()
    COUNTS.add("retries")
    COUNTS.add_all({"retries": 2})
    assert (COUNTS.take(), COUNTS.take()) == ({"retries": 3}, {})


def test_a_deadline_keeps_neither_threads_nor_what_was_called() -> None:
    class Held:
        """Stands for an open file."""

    held = Held()
    alive = weakref.ref(held)
    before = threading.active_count()
    deadline = Deadline(5.0)
    assert deadline.run(lambda one=held: one is not None)
    del held
    assert _soon(lambda: alive() is None)
    del deadline
    assert _soon(lambda: threading.active_count() <= before)


def _soon(is_so: Callable[[], bool]) -> bool:
    """Whether something is so within some seconds."""
    return any(is_so() or time.sleep(0.01) for _ in range(500))
