"""A run's report as a whole: files in the run folder, printed lines, resume, silence off the main rank."""

from __future__ import annotations

import io
from pathlib import Path

from rich.console import Console

from k25_train.config.resolve import compose
from k25_train.config.schema import Config
from k25_train.metrics.report import Report
from k25_train.metrics.sinks import read_rows


def config_for(folder: Path) -> Config:
    schedule = ["train.steps=6", "optim.warmup_steps=1", "optim.decay_steps=2"]
    return compose(["experiment=smoke", f"run.dir={folder}", *schedule])


def run_steps(folder: Path, start: int, stop: int, is_main: bool = True) -> str:
    stream = io.StringIO()
    config = config_for(folder)
    with Report(config, is_main, Console(file=stream, width=100)) as report:
        report.start(start)
        if start == 0:
            report.evaluation(0, text_loss=8.0, caption_loss=8.5)
        for step in range(start + 1, stop + 1):
            report.step(step, {"loss": 8.0 - step, "tokens": 100, "step_time_s": 0.5, "tokens_per_s": 200.0})
        if stop == config.train.steps:
            report.evaluation(stop, text_loss=4.0, caption_loss=2.0)
            report.finish()
        else:
            report.stopped(stop, "SIGTERM")
    return stream.getvalue()


def test_whole_run(tmp_path: Path) -> None:
    text = run_steps(tmp_path, start=0, stop=6)
    rows = read_rows(tmp_path / "metrics.jsonl")
    assert [row["step"] for row in rows] == list(range(7))
    assert rows[0] == {"step": 0, "eval_text_loss": 8.0, "eval_caption_loss": 8.5}
    assert rows[6]["loss"] == 2.0
    assert rows[6]["eval_caption_loss"] == 2.0
    assert (tmp_path / "loss.png").stat().st_size > 10_000
    assert list((tmp_path / "tensorboard").glob("events.*"))
    assert "step 2/6  loss 6.0000  200 tokens/s  2s left" in text
    assert "8.0000 -> 4.0000 (-50.0%)" in text
    assert "MFU" not in text


def test_stopped_run_goes_on_where_it_was(tmp_path: Path) -> None:
    first = run_steps(tmp_path, start=0, stop=4)
    assert "SIGTERM: stopped after step 4" in first
    assert (tmp_path / "loss.png").exists()
    second = run_steps(tmp_path, start=3, stop=6)
    assert "resumes after step 3" in second
    assert [row["step"] for row in read_rows(tmp_path / "metrics.jsonl")] == list(range(7))


def test_other_ranks_are_silent(tmp_path: Path) -> None:
    assert run_steps(tmp_path, start=0, stop=6, is_main=False) == ""
    assert list(tmp_path.iterdir()) == []
