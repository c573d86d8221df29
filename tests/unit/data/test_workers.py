"""Workers of a reading process: they give what it would by itself, and their end is survived or named."""

import os
import signal
import threading
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest

from k25_train.data import loader as loader_module
from k25_train.data.decode.items import PlannedMedia
from k25_train.data.decode.media import MediaPatches, MediaReader
from k25_train.data.reading_process import ReadingProcess
from k25_train.data.share_reader import Share
from k25_train.data.source import ThreadSource
from k25_train.data.workers import pool
from k25_train.errors import DataError
from tests.helpers.reading import ALL, assert_same, config_of, descendants, has_ended
from tests.helpers.tiny_shards import write_tiny_shard_set

COUPLED = replace(ALL, reads=replace(ALL.reads, pixels=True))
TWO = "data.workers=2"


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tiny_shard_set(tmp_path_factory.mktemp("shards"))


@pytest.fixture
def reading(data: Path) -> Iterator[ReadingProcess]:
    with ReadingProcess(config_of(data, TWO)) as source:
        source.open()
        source.take(ALL)
        yield source


def workers_of(reading: ReadingProcess) -> list[int]:
    return [pid for pid, name in descendants(reading.pid) if name == "k25-data-worker"]


@pytest.mark.parametrize(
    "share",
    [pytest.param(ALL, id="decoupled"), pytest.param(COUPLED, id="coupled", marks=pytest.mark.slow)],
)
def test_workers_give_what_the_process_gives_by_itself(
    data: Path, share: Share, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also where hardly anything may be in flight, so that results are taken one by one."""
    monkeypatch.setattr(pool, "IN_FLIGHT_BYTES", 2**14)
    mode = ["dep.mode=coupled"] if share is COUPLED else []
    with ThreadSource(config_of(data, *mode)) as alone, ReadingProcess(config_of(data, TWO, *mode)) as source:
        for each in (alone, source):
            each.open()
            each.take(share)
        for step in (0, 1, 5, 2):
            assert_same(source.step(step), alone.step(step))
        assert_same(source.evaluation(8, 5), alone.evaluation(8, 5))


def test_a_worker_that_dies_is_replaced_and_nothing_is_lost(reading: ReadingProcess, data: Path) -> None:
    with ThreadSource(config_of(data)) as alone:
        alone.open()
        alone.take(ALL)
        assert_same(reading.step(0), alone.step(0))
        first = workers_of(reading)
        assert len(first) == 2
        os.kill(first[0], signal.SIGKILL)
        for step in range(1, 8):
            assert_same(reading.step(step), alone.step(step))
        now = workers_of(reading)
        assert len(now) == 2
        assert first[0] not in now


def test_a_file_that_kills_its_decoder_ends_the_run_by_its_name(
    data: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    here = os.getpid()

    def crashes(reader: MediaReader, media: PlannedMedia, positions: object = None) -> MediaPatches:
        assert os.getpid() != here
        os.kill(os.getpid(), signal.SIGSEGV)
        raise AssertionError

    monkeypatch.setattr(MediaReader, "load", crashes)
    told = (
        r"(?s)worker that reads data \(pid \d+\) was ended by signal 11 while it read train-\d+\.tar at "
        r"byte \d+ \((image|video), \.\w+\).*Fatal Python error.*second one.*take it out of the data"
    )
    with ReadingProcess(config_of(data, TWO)) as source:
        source.open()
        source.take(ALL)
        with pytest.raises(DataError, match=told):
            for step in range(8):
                source.step(step)


@pytest.mark.slow
def test_a_file_that_hangs_its_decoder_ends_the_run_by_its_name(
    data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Once is survived: another worker reads the file."""
    load, hung, forever = MediaReader.load, tmp_path / "hung", threading.Event()
    here = os.getpid()

    def hangs(reader: MediaReader, media: PlannedMedia, positions: object = None) -> MediaPatches:
        if os.getpid() != here and (not hung.exists() or forever.is_set()):
            hung.touch()
            signal.pause()
        return load(reader, media, positions)  # type: ignore[arg-type]

    monkeypatch.setattr(MediaReader, "load", hangs)
    monkeypatch.setattr(pool, "UNIT_READ_TIMEOUTS", 3)
    told = (
        r"(?s)worker that reads data \(pid \d+\) was ended \(was ended by signal 6\), since it took more "
        r"than 3 s while it read train-\d+\.tar at byte \d+ \((image|video), \.\w+\).*in hangs.*second one"
        r".*may hang its decoder"
    )
    impatient = config_of(data, TWO, "data.read_timeout_s=1")
    with ThreadSource(config_of(data)) as alone, ReadingProcess(impatient) as source:
        for each in (alone, source):
            each.open()
            each.take(ALL)
        for step in range(2):
            assert_same(source.step(step), alone.step(step))
        assert hung.exists()
    forever.set()
    with ReadingProcess(impatient) as source:
        source.open()
        source.take(ALL)
        with pytest.raises(DataError, match=told):
            for step in range(8):
                source.step(step)


def test_workers_end_with_whoever_reads_or_trains(reading: ReadingProcess) -> None:
    reading.step(0)
    below = [pid for pid, _ in descendants(reading.pid)]
    assert len(below) == 3
    os.kill(reading.pid, signal.SIGKILL)
    assert all(map(has_ended, below))


@pytest.mark.slow
def test_workers_run_where_the_rank_was_bound(data: Path) -> None:
    cpus = os.sched_getaffinity(0)
    with ReadingProcess(config_of(data, TWO)) as source:
        try:
            os.sched_setaffinity(0, {min(cpus)})
            source.open()
            source.take(ALL)
            source.step(0)
            found = [os.sched_getaffinity(pid) for pid, _ in descendants(source.pid)]
        finally:
            os.sched_setaffinity(0, cpus)
    assert found == [{min(cpus)}] * 3


@pytest.mark.slow
def test_nothing_is_forked_by_a_process_with_threads(
    data: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """Opening the files starts threads in the reading process; a worker that replaces another comes later."""
    log = tmp_path / "threads"
    opened = loader_module.open_sources

    def with_a_thread(*arguments: object) -> object:
        threading.Thread(target=signal.pause, daemon=True).start()
        return opened(*arguments)  # type: ignore[arg-type]

    monkeypatch.setattr(loader_module, "open_sources", with_a_thread)
    fork = os.fork

    def noted() -> int:
        with log.open("a") as file:
            file.write(f"{len(os.listdir('/proc/self/task'))}\n")
        return fork()

    monkeypatch.setattr(os, "fork", noted)
    with ReadingProcess(config_of(data, TWO)) as source:
        source.open()
        source.take(ALL)
        source.step(0)
        os.kill(workers_of(source)[0], signal.SIGKILL)
        for step in range(1, 6):
            source.step(step)
    # The reading process, its nursery, two workers and the one in the place of the first. The first is forked
    # by this process, whose threads are the test's.
    assert log.read_text().split()[1:] == ["1"] * 4


def test_errors_of_workers_are_those_of_the_process(tmp_path: Path) -> None:
    texts = []
    for number, more in enumerate(([], [TWO])):
        folder = write_tiny_shard_set(tmp_path / f"{number}" / "set")
        with ReadingProcess(config_of(folder, *more, "data.max_skipped_samples=2")) as source:
            source.open()
            source.take(COUPLED)
            for shard in folder.glob("train-*.tar"):
                shard.write_bytes(b"\0" * shard.stat().st_size)
            with pytest.raises(DataError) as caught:
                for step in range(8):
                    source.step(step)
            skipped = dict(source.skip_log.skipped)
        texts.append((str(caught.value), skipped))
        texts[-1] = eval(repr(texts[-1]).replace(str(folder), "SET"))
    assert texts[0] == texts[1]
    assert "3 samples cannot be used" in texts[0][0]
