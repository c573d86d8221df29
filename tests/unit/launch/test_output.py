"""Logs that grow without end: the beginning and the newest lines stay, and no line is lost on the way."""

import fcntl
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

from launch import output
from launch.output import LIMIT, LOGS, STUCK, cut, family, keep_others_limited, limit_of_environment
from launch.step_log import StepLog

TALKER = """
import os, sys, time
from pathlib import Path
from launch import output
output.CHECK_S = 0.001
log, limit, lines = Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3])
output.redirect(log)
output.keep_limited(log, limit)
for number in range(lines):
    stream = (1, 2)[number % 2]
    os.write(stream, b"%s line %06d\\n" % (sys.argv[4].encode(), number))
    if number % 100 == 99:
        time.sleep(0.01)
"""


def talk(log: Path, limit_bytes: int, num_lines: int, name: str = "a") -> "subprocess.Popen[bytes]":
    """A process that prints so many lines into a log."""
    return subprocess.Popen([sys.executable, "-c", TALKER, str(log), str(limit_bytes), str(num_lines), name])


def lines_of(*logs: Path) -> list[str]:
    """Their lines."""
    return [line for log in logs if log.exists() for line in log.read_text().splitlines()]


def expected(num_lines: int, name: str = "a") -> list[str]:
    """All lines that a process prints."""
    return [f"{name} line {number:06d}" for number in range(num_lines)]


@pytest.mark.parametrize("limit_bytes", [0, 10**6])
def test_a_log_within_its_limit_stays_as_it_is(tmp_path: Path, limit_bytes: int) -> None:
    log = tmp_path / "rank_0.log"
    assert talk(log, limit_bytes, 500).wait() == 0
    assert lines_of(log) == expected(500) and [path.name for path in tmp_path.iterdir()] == [log.name]


def test_no_line_is_lost_when_a_log_is_continued(tmp_path: Path) -> None:
    """What both streams write goes on in the new file at once, without a gap or a line twice."""
    log = tmp_path / "rank_0.log"
    assert talk(log, 8_000, 1_400).wait() == 0
    newest, previous, first = family(log)
    assert first.exists() and newest.exists()
    assert lines_of(first, previous, newest) == expected(1_400)


def test_the_beginning_and_the_newest_lines_of_a_flood_stay(tmp_path: Path) -> None:
    log, limit_bytes, num_lines = tmp_path / "rank_0.log", 6_000, 5_000
    assert talk(log, limit_bytes, num_lines).wait() == 0
    newest, previous, first = family(log)
    all_lines = expected(num_lines)
    assert lines_of(first) == all_lines[: len(lines_of(first))]
    end = lines_of(previous, newest)
    assert end == all_lines[-len(end) :] and len(end) * 14 > limit_bytes
    assert sum(path.stat().st_size for path in family(log)) < 10 * limit_bytes


def test_a_flood_between_two_looks_is_shortened(tmp_path: Path) -> None:
    log = tmp_path / "rank_0.log"
    before = [os.dup(stream) for stream in (1, 2)]
    try:
        output.redirect(log)
        os.write(1, b"the first error\n" + b"x" * 100_000 + b"\nthe last line\n")
        output.continue_if_long(log, 1_000)
    finally:
        for stream, was in zip((1, 2), before, strict=True):
            os.dup2(was, stream)
            os.close(was)
    text = family(log)[2].read_bytes()
    assert len(text) < 2_200 and text.startswith(b"the first error\n") and text.endswith(b"\nthe last line\n")


def test_processes_may_share_a_log(tmp_path: Path) -> None:
    log = tmp_path / "node_n1.log"
    talkers = [talk(log, 30_000, 1_500, name) for name in "ab"]
    assert [talker.wait() for talker in talkers] == [0, 0]
    found = lines_of(*family(log))
    for name in "ab":
        own = [line for line in found if line.startswith(name)]
        assert sorted(own) == expected(1_500, name)


def test_one_process_at_a_time_continues_a_shared_log(tmp_path: Path) -> None:
    """Otherwise two take it for the first one, and the beginning is overwritten."""
    log = tmp_path / "node_n1.log"
    before = [os.dup(stream) for stream in (1, 2)]
    try:
        output.redirect(log)
        os.write(1, b"x" * 100)
        with log.open("ab") as other:
            fcntl.flock(other, fcntl.LOCK_EX)
            with pytest.raises(BlockingIOError):
                output.continue_if_long(log, 50)
            assert list(tmp_path.iterdir()) == [log]
        output.continue_if_long(log, 50)
    finally:
        for stream, was in zip((1, 2), before, strict=True):
            os.dup2(was, stream)
            os.close(was)
    newest, _, first = family(log)
    assert newest.read_bytes() == b"" and first.read_bytes() == b"x" * 100


def test_a_full_disk_does_not_end_the_watching(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The new file cannot be made, the old one goes on under its other name, until there is room."""
    log = tmp_path / "rank_0.log"
    before = [os.dup(stream) for stream in (1, 2)]
    try:
        output.redirect(log)
        os.write(1, b"x" * 100)
        with monkeypatch.context() as full:
            full.setattr(os, "open", lambda *_: (_ for _ in ()).throw(OSError(28, "No space left on device")))
            with pytest.raises(OSError, match="No space"):
                output.continue_if_long(log, 50)
        os.write(1, b"still here")
        output.continue_if_long(log, 50)
        os.write(2, b"new")
    finally:
        for stream, was in zip((1, 2), before, strict=True):
            os.dup2(was, stream)
            os.close(was)
    newest, _, first = family(log)
    assert newest.read_bytes() == b"new" and first.read_bytes() == b"x" * 100 + b"still here"


def test_a_log_is_cut_from_outside_while_its_program_appends(tmp_path: Path) -> None:
    log = tmp_path / "srun.log"
    with log.open("ab", buffering=0) as writer:
        writer.write(b"the first error\n" + b"x" * 990)
        cut(log, 1_000)
        assert log.stat().st_size == 1_006
        writer.write(b"y" * (STUCK * 1_000) + b"\nthe newest line\n")
        cut(log, 1_000)
        writer.write(b"and one more\n")
    text = log.read_bytes()
    assert text.startswith(b"the first error\n") and text.endswith(b"\nthe newest line\nand one more\n")
    assert b"[... 3023 bytes were left out here" in text and len(text) < 2_200 and b"\0" not in text


def test_torchrun_cuts_what_a_rank_does_not(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its process is stuck in native code that prints, or has left the file to a child."""
    monkeypatch.setattr(output, "CHECK_OTHERS_S", 0.01)
    log = tmp_path / "rank_3.log"
    log.write_bytes(b"x" * 10_000)
    monkeypatch.setenv(LIMIT, "1000")
    monkeypatch.setenv(LOGS, os.pathsep.join([str(tmp_path / "node_n1.log"), str(log)]))
    assert limit_of_environment() == 1000
    keep_others_limited()
    while log.stat().st_size == 10_000:
        time.sleep(0.01)
    assert log.stat().st_size < 2_200


def test_a_failure_in_sruns_log_is_found_as_it_grows(tmp_path: Path) -> None:
    log = tmp_path / "srun.log"
    watched = StepLog(log, 1_000)
    assert watched.look() is None
    with log.open("ab", buffering=0) as writer:
        writer.write(b"module loaded\nsrun: err")
        assert watched.look() is None
        writer.write(b"or: n2: task 1: Kil")
        assert watched.look() == "n2"
        writer.write(b"led\nsrun: error: n1: task 0: Exited\n" + b"x" * 9_000)
        assert watched.look() == "n2"
    assert log.stat().st_size < 2_200


def test_a_failure_is_found_after_a_flood_was_cut(tmp_path: Path) -> None:
    log = tmp_path / "srun.log"
    watched = StepLog(log, 1_000)
    with log.open("ab", buffering=0) as writer:
        writer.write(b"x" * 50_000)
        assert watched.look() is None and log.stat().st_size < 2_200
        writer.write(b"\nsrun: error: n2: task 1: Killed\n")
        assert watched.look() == "n2"
