"""metrics.jsonl and TensorBoard: precision, resume, torn lines, full disks."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from k25_train.errors import K25Error
from k25_train.metrics.sinks import JsonlSink, TensorBoardSink, number, read_rows


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


def test_broken_line_is_named(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"step": 1}\nnonsense\n{"step": 2}\n')
    with pytest.raises(K25Error, match=r"metrics\.jsonl, line 2: not a JSON object .*remove the line"):
        JsonlSink(path, first_step=5)


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs Linux's /dev/full")
def test_full_disk_is_named(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    sink = JsonlSink(path, first_step=1)
    sink._file = Path("/dev/full").open("w")  # noqa: SIM115
    with pytest.raises(K25Error, match=r"metrics\.jsonl: cannot write metrics .*No space left.*run\.dir"):
        sink.write({"step": 1})


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
