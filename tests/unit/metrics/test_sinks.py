"""metrics.jsonl and TensorBoard: precision, resume, torn lines, full disks."""

from __future__ import annotations

import json
import re
import resource
import shutil
import subprocess
import sys
import threading
from pathlib import Path

import pytest

from k25_train.metrics.sinks import JsonlSink, Row, SteadySink, TensorBoardSink, number, read_rows
from k25_train.run_folder.rows_file import drop_rows_from


def write_steps(path: Path, steps: range, first_step: int) -> None:
    sink = JsonlSink(path, first_step)
    for step in steps:
        sink.write({"step": step, "loss": 1 / (step + 3)})
    sink.close()


def test_floats_come_back_bit_for_bit(tmp_path: Path) -> None:
    path = tmp_path / "run" / "metrics.jsonl"
    row = {"step": 1, "loss": 0.1 + 0.2, "grad_norm": 1e-310, "tokens": 2**53 + 1}
    sink = JsonlSink(path, first_step=1)
    sink.write(row)
    assert read_rows(path) == [row]  # flushed, though still open
    sink.close()


def test_numbers_that_json_lacks_become_null(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    sink = JsonlSink(path, first_step=1)
    sink.write({"step": 1, "loss": float("nan"), "grad_norm": float("inf")})
    sink.close()
    assert json.loads(path.read_text(), parse_constant=pytest.fail) == {
        "step": 1,
        "loss": None,
        "grad_norm": None,
    }


def test_a_list_is_written_element_by_element(tmp_path: Path) -> None:
    sink = JsonlSink(tmp_path / "metrics.jsonl", first_step=1)
    sink.write({"step": 1, "max_logits": [0.1 + 0.2, float("inf")]})
    sink.close()
    [row] = read_rows(tmp_path / "metrics.jsonl")
    assert row == {"step": 1, "max_logits": [0.1 + 0.2, None]}
    with pytest.raises(TypeError, match="is a list of metrics, not one"):
        number(row["max_logits"])


def test_resume_drops_steps_from_the_resumed_one(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    write_steps(path, range(8), first_step=0)
    before = path.read_text().splitlines()
    write_steps(path, range(5, 7), first_step=5)
    assert [row["step"] for row in read_rows(path)] == [0, 1, 2, 3, 4, 5, 6]
    assert path.read_text().splitlines() == before[:7]
    write_steps(path, range(0), first_step=0)
    assert read_rows(path) == []


def test_line_cut_short_by_a_kill_is_dropped(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    write_steps(path, range(3), first_step=0)
    path.write_text(path.read_text() + '{"step": 3, "lo')
    assert len(read_rows(path)) == 3
    write_steps(path, range(3, 4), first_step=3)
    assert [row["step"] for row in read_rows(path)] == [0, 1, 2, 3]


BAD_LINES = {
    "not JSON": b"nonsense",
    "not UTF-8": b"\xff\xfe\x00",
    "NUL bytes": b"\x00" * 512,
    "a list": b"[1, 2]",
    "a number": b"7",
    "no step": b'{"loss": 1.0}',
    "a step that is a text": b'{"step": "2"}',
    "a step that is true": b'{"step": true}',
    "a metric that is a mapping": b'{"step": 2, "loss": {"a": 1}}',
    "half a line and another": b'{"step": 2, "lo{"step": 3}',
    "nested without end": b"[" * 5000,
}


@pytest.mark.parametrize("bad", BAD_LINES.values(), ids=BAD_LINES)
def test_damaged_lines_are_set_aside_in_the_middle_and_dropped_at_the_end(tmp_path: Path, bad: bytes) -> None:
    path, told = tmp_path / "metrics.jsonl", []
    path.write_bytes(b'{"step": 1}\n' + bad + b'\n{"step": 2, "loss": 0.5}\n' + bad)
    assert read_rows(path) == [{"step": 1}, {"step": 2, "loss": 0.5}]
    sink = JsonlSink(path, 3, told.append)
    sink.write({"step": 3})
    sink.close()
    assert path.read_bytes() == b'{"step": 1}\n{"step": 2, "loss": 0.5}\n{"step": 3}\n'
    assert (tmp_path / "metrics.damaged").read_bytes() == bad + b"\n"
    assert told == [f"{path}: 1 damaged line(s) moved to {tmp_path / 'metrics.damaged'}"]


def test_a_last_row_that_lacks_its_line_end_only_is_kept(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    path.write_bytes(b'{"step": 1}\n{"step": 2}')
    write_steps(path, range(3, 4), first_step=3)
    assert [row["step"] for row in read_rows(path)] == [1, 2, 3]


def test_a_resume_needs_no_room(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "metrics.jsonl"
    write_steps(path, range(8), first_step=0)
    monkeypatch.setattr(Path, "write_bytes", lambda *_: pytest.fail("a copy was written"))
    drop_rows_from(path, 5, pytest.fail)
    assert [row["step"] for row in read_rows(path)] == [0, 1, 2, 3, 4]


def test_what_a_killed_process_left_goes_at_the_next_start(tmp_path: Path) -> None:
    (tmp_path / "metrics.tmp").write_text("half of it")
    write_steps(tmp_path / "metrics.jsonl", range(2), first_step=0)
    assert [path.name for path in tmp_path.iterdir()] == ["metrics.jsonl"]


class Scripted:
    """A sink that takes rows while it is told to."""

    rows_per_flush = 2

    def __init__(self, taken: list[float], fault: list[Exception]) -> None:
        self.taken, self.fault = taken, fault
        self.buffered: list[float] = []

    def write(self, row: Row) -> None:
        self.buffered.append(number(row["step"]))

    def flush(self) -> None:
        if self.fault:
            raise self.fault[0]
        self.taken += self.buffered
        self.buffered = []

    def close(self) -> None:
        self.flush()


def test_a_sink_that_fails_gets_its_rows_when_it_works_again() -> None:
    taken, fault, told, now = [], [], [], [0.0]
    sink = SteadySink("events", lambda _: Scripted(taken, fault), told.append, clock=lambda: now[0])
    for step in range(1, 9):
        fault[:] = [OSError(28, "No space left on device")] if 3 <= step < 6 else []
        now[0] += 6.0
        sink.write({"step": step})
    sink.close()
    assert taken == list(range(1, 9))
    assert len(told) == 2 and "events: cannot be written (ENOSPC" in told[0], told
    assert re.fullmatch(r"events: works again, \d row\(s\) that waited are written", told[1])


def test_rows_that_wait_are_bounded_and_those_lost_are_counted() -> None:
    taken, told = [], []
    fault = [RuntimeError("a thread died")]
    sink = SteadySink("events", lambda _: Scripted(taken, fault), told.append, most_rows=5, clock=lambda: 0.0)
    for step in range(1, 9):
        sink.write({"step": step})
    assert sink.num_lost == 3
    fault.clear()
    sink.close()
    assert taken == [4, 5, 6, 7, 8]
    assert told[-1] == "events: 3 row(s) could not be written and are lost"


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs Linux's /dev/full")
def test_a_full_disk_keeps_rows_in_memory(tmp_path: Path) -> None:
    path, told, now = tmp_path / "metrics.jsonl", [], [0.0]
    sink = SteadySink("m", lambda step: JsonlSink(path, step, told.append), told.append, clock=lambda: now[0])
    sink.start(1)
    sink.write({"step": 1})
    # The file is on a full disk from here on.
    moved = path.rename(tmp_path / "moved")
    path.symlink_to("/dev/full")
    for step in (2, 3):
        sink.write({"step": step})
    assert [line.split("(")[0] for line in told] == ["m: cannot be written "]
    path.unlink()
    moved.rename(path)
    now[0] = 60.0
    sink.write({"step": 4})
    sink.close()
    assert [row["step"] for row in read_rows(path)] == [1, 2, 3, 4]
    assert told[1:] == ["m: works again, 3 row(s) that waited are written"]


def test_no_half_line_stays_where_a_file_may_not_grow(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    write_steps(path, range(3), first_step=0)
    before, limits = path.read_bytes(), resource.getrlimit(resource.RLIMIT_FSIZE)
    sink = JsonlSink(path, 3)
    resource.setrlimit(resource.RLIMIT_FSIZE, (len(before) + 10, limits[1]))
    try:
        with pytest.raises(OSError, match="No space left"):
            sink.write({"step": 3, "loss": 0.5})
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert path.read_bytes() == before
    sink.close()


def test_a_fault_of_tensorboards_thread_ends_nothing_and_loses_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    printed: list[threading.ExceptHookArgs] = []
    monkeypatch.setattr(threading, "excepthook", printed.append)

    folder, told, now = tmp_path / "events", [], [0.0]
    sink = SteadySink("t", lambda step: TensorBoardSink(folder, step), told.append, clock=lambda: now[0])
    sink.write({"step": 1, "loss": 1.0})
    shutil.rmtree(folder)
    folder.write_text("in the way", encoding="utf-8")
    for step in range(2, 45):
        sink.write({"step": step, "loss": 1.0 / step})
    folder.unlink()
    now[0] = 60.0
    sink.write({"step": 45, "loss": 0.0})
    sink.close()
    assert len(told) == 2 and told[0].startswith("t: cannot be written ("), told
    events = EventAccumulator(str(folder), size_guidance={"scalars": 0})
    events.Reload()
    # The first one was written, and went with the folder.
    assert [event.step for event in events.Scalars("train/loss")] == list(range(2, 46))
    assert printed == []


def test_tensorboard_has_the_scalars(tmp_path: Path) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    sink = TensorBoardSink(tmp_path, first_step=1)
    sink.write({"step": 1, "loss": 2.5, "lr": None})
    sink.write({"step": 2, "loss": 1.5, "eval_text_loss": 3.0, "max_logits": [7.0, 8.0]})
    sink.close()
    resumed = TensorBoardSink(tmp_path, first_step=2)
    resumed.write({"step": 2, "loss": 1.25})
    resumed.close()
    events = EventAccumulator(str(tmp_path))
    events.Reload()
    assert [(event.step, event.value) for event in events.Scalars("train/loss")] == [(1, 2.5), (2, 1.25)]
    assert events.Tags()["scalars"] == ["train/loss", "eval/text_loss", "max_logits/00", "max_logits/01"]


def test_metrics_import_without_torch() -> None:
    modules = "plots, progress, sinks, summary, throughput"
    code = f"import sys; sys.modules['torch'] = None; from k25_train.metrics import {modules}"
    subprocess.run([sys.executable, "-c", code], check=True)
