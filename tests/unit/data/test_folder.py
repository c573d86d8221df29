"""Where a shard set may be, and what happens when its files cannot be read."""

import errno
import itertools
import logging
import os
import re
import shutil
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import fsspec
import pytest

from k25_train.data import folder, open_files
from k25_train.data.folder import DataFolder
from k25_train.data.formats.dataset import load_dataset
from k25_train.data.loader import DataLoader
from k25_train.data.smoke_set.verify import verify_dataset
from k25_train.data.storage import attempts
from k25_train.data.tokenizer import load_tokenizer
from k25_train.errors import DataError
from tests.helpers.tiny_shards import (
    all_words,
    tiny_data_config,
    tiny_train_config,
    tiny_vision_config,
    write_tiny_shard_set,
)


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tiny_shard_set(tmp_path_factory.mktemp("tiny") / "set")


@pytest.fixture
def in_memory(tiny: Path) -> Iterator[str]:
    """The set in fsspec's memory, as a stand-in for an object store."""
    files = fsspec.filesystem("memory")
    for file in tiny.iterdir():
        files.pipe(f"/tiny/{file.name}", file.read_bytes())
    yield "memory://tiny"
    files.rm("/tiny", recursive=True)


def tokens_of(directory: str, tokenizer: str | None = None) -> list[list[int]]:
    data = replace(tiny_data_config(Path("x")), dir=directory, tokenizer=tokenizer)
    with DataLoader(data, tiny_train_config(), tiny_vision_config()) as loader:
        batches = loader.micro_batches(
            loader.plan(2), dp_rank=0, dp_size=1, reads=all_words(with_pixels="memory" in directory)
        )
        return [batch.tokens.tolist() for batch in batches]


def test_urls_work_throughout(tiny: Path, in_memory: str, tmp_path: Path) -> None:
    expected = tokens_of(str(tiny))
    chained = f"simplecache::{in_memory}"
    odd = tmp_path / "a::b [*]? #1"
    shutil.copytree(tiny, odd)

    for directory in (f"file://{tiny}", in_memory, chained, str(odd)):
        assert tokens_of(directory) == expected, directory
        tokenizer = f"{directory}/tokenizer.json"
        assert tokens_of(str(tiny), tokenizer) == expected, tokenizer
        assert load_tokenizer(tokenizer).sha256 == load_tokenizer(tiny / "tokenizer.json").sha256
    # The tiny set has no checksums of its files as a built set has, and nothing else is wrong with it.
    (fault,) = verify_dataset(in_memory, lambda line: None)
    assert fault == f"{in_memory}/SHA256SUMS: missing"


PLACES = {
    "no such folder": ("/nowhere/at/all", r"/nowhere/at/all/dataset\.json: no such file"),
    "a missing package": ("gs://bucket/set", r"data\.dir=gs://bucket/set: .*nstall gcsfs.* with pip"),
    "an unknown protocol": ("foo://bucket/set", r"data\.dir=foo://bucket/set: .*Protocol not known: foo"),
    "a chain of nothing": (
        "a::b",
        r"data\.dir=a::b: there is no such folder, .* 'a' is none that fsspec knows",
    ),
    "NUL": ("set\0", r"data\.dir='set\\x00': has a NUL byte"),
    "a name that is too long": ("x" * 5000, r"cannot be read \(File name too long, ENAMETOOLONG\)"),
    "an empty memory": ("memory://nothing", r"memory://nothing/dataset\.json: no such file"),
}


@pytest.mark.parametrize(("place", "message"), PLACES.values(), ids=PLACES.keys())
def test_place_without_a_set_is_named(place: str, message: str) -> None:
    with pytest.raises(DataError, match=message):
        load_dataset(place)


def test_a_file_instead_of_a_folder_is_named(tiny: Path) -> None:
    with pytest.raises(
        DataError, match=r"dataset\.json/dataset\.json: cannot be read \(Not a directory, ENOTDIR"
    ):
        load_dataset(str(tiny / "dataset.json"))
    with pytest.raises(
        DataError, match=rf"{re.escape(str(tiny))}: this tokenizer cannot be read \(Is a directory"
    ):
        load_dataset(str(tiny), str(tiny))
    with pytest.raises(DataError, match=r"data\.tokenizer=gs://b/t\.json: .*nstall gcsfs"):
        load_dataset(str(tiny), "gs://b/t.json")


class Failing:
    """A file system whose reads fail for a while."""

    def __init__(self, errors: Iterator[Exception]) -> None:
        self.errors = errors
        self.num_reads = 0

    def size(self, path: str) -> int:
        return len(self.read(path, 0, 0))

    def read(self, path: str, offset: int, num_bytes: int) -> bytes:
        self.num_reads += 1
        for error in self.errors:
            raise error
        return b"content"


@pytest.fixture
def waits(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """The seconds that a folder would have waited."""
    waited: list[float] = []

    class Closing:
        """As threading.Event, without the time that passes."""

        is_set = staticmethod(lambda: False)
        set = staticmethod(lambda: None)
        wait = staticmethod(waited.append)

    monkeypatch.setattr(folder, "Event", Closing)
    monkeypatch.setattr(attempts, "JITTER", 0.0)
    return waited


def failing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, errors: Iterator[Exception]
) -> tuple[DataFolder, Failing]:
    data_folder, files = DataFolder(str(tmp_path)), Failing(errors)
    monkeypatch.setattr(data_folder._files, "read", files.read)
    monkeypatch.setattr(os.path, "getsize", files.size)
    return data_folder, files


PASSING: dict[str, Callable[[], Exception]] = {
    "EIO": lambda: OSError(errno.EIO, "x"),
    "ESTALE": lambda: OSError(errno.ESTALE, "x"),
    "ENOENT": lambda: FileNotFoundError(errno.ENOENT, "x"),
    "EACCES": lambda: PermissionError(errno.EACCES, "x"),
    "ETIMEDOUT": lambda: TimeoutError(errno.ETIMEDOUT, "x"),
    "timeout without a number": lambda: TimeoutError(),
    "an error of a library": lambda: RuntimeError("connection lost"),
}


@pytest.mark.parametrize("make", PASSING.values(), ids=PASSING.keys())
def test_fault_that_passes_is_told_and_costs_nothing(
    tmp_path: Path,
    waits: list[float],
    caplog: pytest.LogCaptureFixture,
    monkeypatch: pytest.MonkeyPatch,
    make: Callable[[], Exception],
) -> None:
    data_folder, _ = failing(tmp_path, monkeypatch, iter([make(), make()]))

    with caplog.at_level(logging.WARNING):
        assert data_folder.read_range("train.tar", 0, 7) == b"content"

    assert waits == [1, 2]
    assert re.search(rf"{tmp_path}/train\.tar: .+; trying again in 1 s \(1 of \d\)", caplog.text)


@pytest.mark.parametrize(
    ("make", "seconds"), [(PASSING["EIO"], 60), (PASSING["ENOENT"], 15), (PASSING["EACCES"], 15)]
)
def test_fault_that_stays_ends_in_bounded_time_with_file_and_remedy(
    tmp_path: Path,
    waits: list[float],
    monkeypatch: pytest.MonkeyPatch,
    make: Callable[[], Exception],
    seconds: float,
) -> None:
    data_folder, files = failing(tmp_path, monkeypatch, (make() for _ in itertools.count()))

    with pytest.raises(DataError, match=rf"{tmp_path}/train\.tar: .* after \d attempts.* data\.dir"):
        data_folder.read_range("train.tar", 0, 7)

    assert sum(waits) == seconds
    assert files.num_reads == len(waits) + 1


def test_what_is_not_there_at_the_start_is_not_waited_for(
    tmp_path: Path, waits: list[float], monkeypatch: pytest.MonkeyPatch
) -> None:
    for make in (PASSING["ENOENT"], PASSING["EACCES"], PASSING["an error of a library"], FileNotFoundError):
        data_folder, _ = failing(tmp_path, monkeypatch, (make() for _ in itertools.count()))
        with pytest.raises(DataError, match=r"no such file\.|cannot be read \("):
            data_folder.read("dataset.json")
        with pytest.raises(DataError, match=r"no such file\.|cannot be read \("):
            data_folder.num_bytes("train.tar")
    assert waits == []


def test_what_passes_is_waited_for_at_the_start_too(
    tmp_path: Path, waits: list[float], monkeypatch: pytest.MonkeyPatch
) -> None:
    data_folder, _ = failing(tmp_path, monkeypatch, iter([OSError(errno.ESTALE, "x"), TimeoutError()]))

    assert data_folder.read("dataset.json") == b"content"
    assert waits == [1, 2]


def test_closing_ends_a_wait(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    data_folder, files = failing(tmp_path, monkeypatch, (OSError(errno.EIO, "x") for _ in itertools.count()))
    data_folder.close()

    with pytest.raises(DataError, match=r"train\.tar"):
        data_folder.read_range("train.tar", 0, 7)

    assert files.num_reads == 1


def test_set_that_moves_away_while_it_is_read(
    tiny: Path, tmp_path: Path, waits: list[float], monkeypatch: pytest.MonkeyPatch
) -> None:
    moving = Path(shutil.copytree(tiny, tmp_path / "set"))
    data = replace(tiny_data_config(moving), prefetch_steps=1)
    with DataLoader(data, tiny_train_config(), tiny_vision_config()) as loader:
        prefetch = loader.prefetch(
            lambda plan: loader.micro_batches(plan, dp_rank=0, dp_size=1, reads=all_words(with_pixels=True))
        )
        prefetch.get(0)
        monkeypatch.setattr(open_files, "RECHECK_S", 0.0)
        os.rename(moving, tmp_path / "away")

        with pytest.raises(DataError, match=r"train-0000\d\.tar: no such file after 5 attempts"):
            for step in range(1, 50):
                prefetch.get(step)
