"""A shard set in a real S3 server, which may refuse, stall, break off, or change what it has."""

import random
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import fsspec
import pytest

from k25_train.data.batch import Reads
from k25_train.data.folder import DataFolder, MissingFileError
from k25_train.data.loader import DataLoader
from k25_train.data.storage import attempts, options
from k25_train.data.storage.block_cache import BlockCache, NoCache
from k25_train.data.storage.counts import COUNTS
from k25_train.data.storage.options import ReadOptions
from k25_train.data.storage.ranges import Range
from k25_train.data.storage.request_rate import NoLimit
from k25_train.data.storage.stamps import Version, version_of
from k25_train.data.units import WordsUnit
from k25_train.errors import DataError
from tests.helpers.s3_server import KEYS, S3, s3_server
from tests.helpers.tiny_shards import (
    all_words,
    tiny_data_config,
    tiny_train_config,
    tiny_vision_config,
    write_tiny_shard_set,
)

CONTENT = random.Random(0).randbytes(3_000_000)


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[S3]:
    with s3_server() as found:
        tiny = write_tiny_shard_set(tmp_path_factory.mktemp("tiny") / "set")
        found.put("corpus", {f"set/{file.name}": file.read_bytes() for file in tiny.iterdir()})
        found.put("objects", {"big": CONTENT})
        yield found


@pytest.fixture
def store(server: S3, monkeypatch: pytest.MonkeyPatch) -> Iterator[S3]:
    for name, value in {**KEYS, "AWS_ENDPOINT_URL": server.url}.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(attempts, "RETRY_DELAYS_S", (0.01, 0.02))
    monkeypatch.setattr(attempts, "GONE_DELAYS_S", (0.01,))
    monkeypatch.setattr(attempts, "HUNG_DELAYS_S", (0.01, 0.01))
    monkeypatch.setattr(options, "_options", ReadOptions(5.0, NoCache(), NoLimit()))
    server.faults.requests.clear()
    COUNTS.take()
    yield server
    server.faults.refusals = server.faults.stalls = server.faults.halves = 0
    fsspec.filesystem("s3").clear_instance_cache()


def tokens_and_pixels(directory: str) -> list[list[object]]:
    data = replace(tiny_data_config(Path("x")), dir=directory)
    with DataLoader(data, tiny_train_config(), tiny_vision_config()) as loader:
        plan = loader.plan(2)
        batches = loader.micro_batches(plan, dp_rank=0, dp_size=1, reads=all_words(with_pixels=True))
        return [[each.tokens.tolist(), str(each.pixels)] for each in batches]


def test_a_set_in_s3_gives_what_a_local_one_does(store: S3, tmp_path: Path) -> None:
    expected = tokens_and_pixels(str(write_tiny_shard_set(tmp_path / "set")))
    assert expected
    assert tokens_and_pixels("s3://corpus/set") == expected


FAULTS = ["refusals", *(pytest.param(name, marks=pytest.mark.slow) for name in ("stalls", "halves"))]


@pytest.mark.parametrize("fault", FAULTS)
def test_a_fault_that_passes_costs_nothing(store: S3, fault: str, caplog: pytest.LogCaptureFixture) -> None:
    folder = DataFolder("s3://objects")
    assert folder.num_bytes("big") == len(CONTENT)
    folder._deadline.timeout_s = 0.7 if fault == "stalls" else 10.0
    setattr(store.faults, fault, 2)
    assert folder.read_range("big", 1000, 70_000) == CONTENT[1000:71_000]
    # The third attempt is the last that is made, and no library tries again underneath.
    assert COUNTS.so_far()["retries"] == 2
    assert [method for method, *_ in store.faults.requests].count("GET") == 3
    assert "objects/big: " in caplog.text


FOREVER = {
    "refusals": r"s3://objects/big: cannot be read after 3 attempts \(.*EBUSY; the store says SlowDown\), "
    r"bytes 5 to 1005\.",
    "stalls": r"s3://objects/big: cannot be read after 3 attempts \(HungReadError: it did not return within "
    r"data\.read_timeout_s=0\.3 s\), bytes 5 to 1005\.",
    "halves": r"s3://objects/big: cannot be read after 3 attempts \(.*\), bytes 5 to 1005\.",
}


@pytest.mark.slow
@pytest.mark.parametrize(("fault", "message"), FOREVER.items(), ids=FOREVER.keys())
def test_a_fault_that_stays_is_named(store: S3, fault: str, message: str) -> None:
    folder = DataFolder("s3://objects")
    folder.num_bytes("big")
    folder._deadline.timeout_s = 0.3 if fault == "stalls" else 10.0
    setattr(store.faults, fault, 1000)
    with pytest.raises(DataError, match=message):
        folder.read_range("big", 5, 1000)


def test_an_object_that_changes_is_never_mixed(
    store: S3, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    cache = BlockCache(tmp_path / "cache", 2**26)
    monkeypatch.setattr(options, "_options", ReadOptions(5.0, cache, NoLimit()))
    store.put("changing", {"shard": CONTENT})
    folder = DataFolder("s3://changing")
    assert folder.read_range("shard", 0, 10) == CONTENT[:10]
    other = CONTENT[::-1]
    store.put("changing", {"shard": other})
    # What is in the cache is of the version that was opened.
    assert folder.read_range("shard", 20, 10) == CONTENT[20:30]
    with pytest.raises(DataError, match=r"s3://changing/shard: it has changed since this run opened it"):
        folder.read_range("shard", 2_500_000, 10)
    # One who opens it now gets the new one alone.
    assert DataFolder("s3://changing").read_range("shard", 0, 10) == other[:10]


def test_what_is_read_is_what_was_indexed(store: S3) -> None:
    """By no request more where the store can be told the version, and at the first read elsewhere."""
    store.put("indexed", {"shard": CONTENT})
    info = fsspec.filesystem("s3").info("indexed/shard")
    indexed = version_of(info)
    assert indexed.etag == info["ETag"]
    for version, requests in ((indexed, ["GET"]), (indexed._replace(stamp=""), ["HEAD", "GET"])):
        store.faults.requests.clear()
        folder = DataFolder("s3://indexed")
        folder.expect({"shard": version}.get)
        assert folder.read_range("shard", 0, 10) == CONTENT[:10]
        assert [method for method, *_ in store.faults.requests] == requests
    store.put("indexed", {"shard": CONTENT[::-1]})
    folder = DataFolder("s3://indexed")
    folder.expect({"shard": indexed}.get)
    told = r"s3://indexed/shard: it has changed since it was indexed: it had .*k25_train\.data index"
    with pytest.raises(DataError, match=told):
        folder.read_range("shard", 0, 10)
    # A file system that cannot be told a version.
    memory = fsspec.filesystem("memory")
    memory.pipe_file("/indexed/shard", CONTENT)
    folder = DataFolder("memory://indexed")
    folder.expect({"shard": Version(len(CONTENT) - 1, "")}.get)
    with pytest.raises(DataError, match=r"memory://indexed/shard: it has changed since it was indexed"):
        folder.read_range("shard", 0, 10)


def test_neighbours_of_a_unit_come_with_one_request(store: S3) -> None:
    data = replace(tiny_data_config(Path("x")), dir="s3://corpus/set")
    with DataLoader(data, tiny_train_config(), tiny_vision_config()) as loader:
        words = WordsUnit(tuple(loader.plan(0).sequences[:4]), Reads(tokens=True, labels=False, pixels=False))
        store.faults.requests.clear()
        loader.read_unit(words)
    gets = [each for each in store.faults.requests if each[0] == "GET"]
    shards = {piece.record.shard for each in words.sequences for piece in each.pieces}
    assert len(gets) == len(shards) < sum(len(each.pieces) for each in words.sequences)


def test_what_is_set_wrong_is_named_at_once(store: S3, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(MissingFileError, match=r"s3://nowhere/a: no such file \(or no such bucket\)"):
        DataFolder("s3://nowhere").read("a")
    with pytest.raises(MissingFileError, match=r"s3://objects/a: no such file"):
        DataFolder("s3://objects").read("a")
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "stranger")
    fsspec.filesystem("s3").clear_instance_cache()
    with pytest.raises(DataError, match=r"s3://objects/big: cannot be read .*credentials.*AWS_PROFILE"):
        DataFolder("s3://objects").read("big")


def test_a_cache_and_a_plan_save_requests(store: S3, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = DataFolder("s3://objects")
    folder.num_bytes("big")
    store.faults.requests.clear()
    ranges = [Range("big", start, start + 1000) for start in range(0, 200_000, 50_000)]
    folder.plan(ranges)
    for each in ranges:
        assert folder.read_range("big", each.start, 1000) == CONTENT[each.start : each.stop]
    assert store.faults.requests == [("GET", "/objects/big", "bytes=0-150999")]

    cache = BlockCache(tmp_path / "cache", 2**26)
    monkeypatch.setattr(options, "_options", ReadOptions(5.0, cache, NoLimit()))
    store.faults.requests.clear()
    for _ in range(2):
        folder = DataFolder("s3://objects")
        assert folder.read_range("big", 1_000_000, 1_200_000) == CONTENT[1_000_000:2_200_000]
    assert [each for each in store.faults.requests if each[0] == "GET"] == [
        ("GET", "/objects/big", "bytes=0-2999999")
    ]
    assert {name: COUNTS.so_far()[name] for name in ("cache_hits", "cache_misses")} == {
        "cache_hits": 3,
        "cache_misses": 3,
    }
