"""The process that reads for a rank: it gives what a thread would, and tells its end and its faults."""

import errno
import os
import signal
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from k25_train.data import reading_process
from k25_train.data.reading_process import NAME, ReadingProcess
from k25_train.data.regions import Region, Written
from k25_train.data.source import DataSource, ThreadSource
from k25_train.data.start import start_source
from k25_train.errors import ConfigError, DataError
from k25_train.joining.same_job import code_of
from tests.helpers.reading import ALL, assert_same, config_of, has_ended
from tests.helpers.smoke_mix import mix
from tests.helpers.tiny_shards import write_tiny_shard_set


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tiny_shard_set(tmp_path_factory.mktemp("shards"))


@pytest.fixture
def reading(data: Path) -> Iterator[ReadingProcess]:
    with ReadingProcess(config_of(data)) as source:
        source.open()
        source.take(ALL)
        yield source


def test_it_gives_what_a_thread_gives(reading: ReadingProcess, data: Path) -> None:
    """Whatever the order, with evaluations in between."""
    with ThreadSource(config_of(data)) as thread:
        assert thread.open().vocab_size > 0
        thread.take(ALL)
        for step in (0, 1, 2, 7, 3):
            assert_same(reading.step(step), thread.step(step))
            if step == 1:
                assert_same(reading.evaluation(4, None), thread.evaluation(4, None))
                assert_same(reading.evaluation(8, 5), thread.evaluation(8, 5))
        assert reading.facts() == thread.facts()
    assert Path(f"/proc/{reading.pid}/comm").read_text().strip() == NAME


def test_the_rank_holds_no_index(reading: ReadingProcess) -> None:
    assert not hasattr(reading, "loader")


def test_its_end_is_a_named_error_with_a_remedy(reading: ReadingProcess) -> None:
    reading.step(0)
    os.kill(reading.pid, signal.SIGKILL)
    for _ in range(2):
        with pytest.raises(DataError, match=r"\(pid \d+\) was ended by SIGKILL.*dmesg.*data.prefetch_steps"):
            reading.step(1)
    # What a save needs was kept.
    assert "data.tokenizer" in reading.facts()


def test_a_crash_tells_its_last_words(reading: ReadingProcess) -> None:
    os.kill(reading.pid, signal.SIGSEGV)
    with pytest.raises(DataError, match=r"(?s)was ended by SIGSEGV; its last words:.*Fatal Python error"):
        reading.step(0)


def test_a_process_that_gets_no_memory_says_so(data: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A status alone would have its cause looked for elsewhere."""
    rank, make = os.getpid(), Written._make

    def fails(written: Written, num_bytes: int) -> Region:
        if os.getpid() != rank:
            raise OSError(errno.EMFILE, "Too many open files")
        return make(written, num_bytes)

    monkeypatch.setattr(Written, "_make", fails)
    told = r"(?s)with status 1; its last words:.*Too many open"
    with ReadingProcess(config_of(data)) as source, pytest.raises(DataError, match=told) as caught:
        source.open()
    assert "SIGKILL" not in str(caught.value)


def test_a_rank_that_cannot_map_memory_ends_by_a_named_error(
    reading: ReadingProcess, monkeypatch: pytest.MonkeyPatch
) -> None:
    """All ranks agree on such an error and save; the next answer would be that to the request before."""

    def fails(number: int, descriptor: int) -> None:
        raise OSError(errno.ENOMEM, "Cannot allocate memory")

    monkeypatch.setattr(reading._channel.received, "map", fails)
    with pytest.raises(DataError, match=r"memory that they share: \[Errno 12\] Cannot allocate memory"):
        for step in range(9):
            reading.step(step)
    assert has_ended(reading.pid)
    with pytest.raises(DataError, match="memory that they share"):
        reading.step(0)


def test_it_outlives_what_asks_its_rank_to_stop(reading: ReadingProcess) -> None:
    """The rank finishes its step, evaluates and saves after such a signal."""
    for number in (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1):
        os.kill(reading.pid, number)
    assert reading.step(0).sizes.num_tokens > 0


@pytest.mark.parametrize("kill", [True, False], ids=["killed", "left"])
def test_it_ends_with_its_rank(data: Path, kill: bool) -> None:
    receiver, sender = os.pipe()
    rank = os.fork()
    if not rank:
        source = ReadingProcess(config_of(data))
        os.write(sender, f"{source.pid}\n".encode())
        if kill:
            signal.pause()
        os._exit(0)
    pid = int(os.read(receiver, 100))
    if kill:
        os.kill(rank, signal.SIGKILL)
    os.waitpid(rank, 0)
    for descriptor in (receiver, sender):
        os.close(descriptor)
    assert has_ended(pid)


def test_closing_ends_it(data: Path) -> None:
    with ReadingProcess(config_of(data)) as source:
        source.open()
    assert has_ended(source.pid)
    with pytest.raises(DataError, match="was closed"):
        source.step(0)


def error_of(source: DataSource) -> str:
    with source, pytest.raises(DataError) as caught:
        source.open()
        source.take(ALL)
        for step in range(20):
            source.step(step)
    return f"{type(caught.value).__name__} {code_of(caught.value)} {caught.value}"


@pytest.mark.parametrize("fault", ["no set", "cut shards", "a kind without samples"])
def test_errors_are_those_of_a_thread_word_by_word(tmp_path: Path, fault: str) -> None:
    folder = write_tiny_shard_set(tmp_path / "set")
    more = ["data.limit_samples=1"] if fault == "a kind without samples" else []
    if fault == "no set":
        (folder / "dataset.json").unlink()
    elif fault == "cut shards":
        for shard in folder.glob("train-*.tar"):
            index = shard.with_name(shard.stem + ".index.jsonl")
            index.write_text(
                index.read_text().replace(f'"shard_bytes": {shard.stat().st_size}', '"shard_bytes": 512')
            )
            shard.write_bytes(b"\0" * 512)
    else:
        more = [*mix(text=1), "train.seq_len=128", "data.max_skipped_samples=0"]
        for index in folder.glob("train-*.index.jsonl"):
            index.write_text(index.read_text().replace('"kind": "text"', '"kind": "ocr"'))
    texts = [error_of(each(config_of(folder, *more))) for each in (ThreadSource, ReadingProcess)]
    assert texts[0] == texts[1]


def test_a_fault_of_the_code_shows_where_it_is(data: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ThreadSource, "facts", lambda self: {}["missing"])
    with ReadingProcess(config_of(data)) as source:
        source.open()
        with pytest.raises(RuntimeError, match=r"(?s)in the process that reads data:.*KeyError: 'missing'"):
            source.facts()


class NotPortableError(OSError):
    """Like those of clients of object stores, which hold their connection."""

    def __init__(self, text: str) -> None:
        super().__init__(text)
        self.connection = threading.Lock()


def test_an_error_that_cannot_be_sent_is_told(data: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fails(source: ThreadSource) -> None:
        raise NotPortableError("the bucket is gone")

    monkeypatch.setattr(ThreadSource, "facts", fails)
    with ReadingProcess(config_of(data)) as source:
        source.open()
        with pytest.raises(RuntimeError, match=r"(?s)process that reads data:.*NotPortableError: the bucket"):
            source.facts()


def test_samples_that_fail_are_counted_by_the_rank(data: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fails(source: ThreadSource, step: int) -> int:
        source.skip_log.add_named(f"sample {step}", "torn", log=False)
        return step

    monkeypatch.setattr(ThreadSource, "step", fails)
    with ReadingProcess(config_of(data, "data.max_skipped_samples=2")) as source:
        source.open()
        assert [source.step(step) for step in (5, 6)] == [5, 6]
        assert dict(source.skip_log.skipped) == {"sample 5": "torn", "sample 6": "torn"}
        with pytest.raises(DataError, match=r"3 samples cannot be used, data\.max_skipped_samples=2"):
            source.step(9)


@pytest.mark.skipif(len(os.sched_getaffinity(0)) < 2, reason="needs two CPUs")
def test_it_runs_where_its_rank_was_bound_since_the_fork(data: Path) -> None:
    all_cpus = os.sched_getaffinity(0)
    with ReadingProcess(config_of(data)) as source:
        try:
            os.sched_setaffinity(0, {min(all_cpus)})
            source.open()
            assert os.sched_getaffinity(source.pid) == {min(all_cpus)}
        finally:
            os.sched_setaffinity(0, all_cpus)


def test_where_it_reads_is_chosen_and_not_guessed(data: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert isinstance(start_source(config_of(data, "data.read_in=thread")), ThreadSource)
    monkeypatch.setattr(reading_process.sys, "platform", "darwin")
    with pytest.raises(ConfigError, match=r"data\.read_in=process needs Linux.*set data\.read_in=thread"):
        start_source(config_of(data))
