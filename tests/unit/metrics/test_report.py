"""A run's report as a whole: files in the run folder, printed lines, resume, silence off the main rank."""

from __future__ import annotations

import re
import shutil
from dataclasses import replace
from pathlib import Path

import pytest

from k25_train.compose.resolve import compose, load
from k25_train.config.schema import Config
from k25_train.metrics.report import Report
from k25_train.metrics.sinks import Row, read_rows
from k25_train.metrics.timeline import RankRecord
from k25_train.plan.time.plan_step import expected_step_s
from parallel.watchdog.recorder import Span


def config_for(folder: Path) -> Config:
    schedule = ["train.steps=6", "optim.warmup=1", "optim.decay=2"]
    return compose(["experiment=smoke", f"run.dir={folder}", *schedule])


def on_gpus(folder: Path) -> Config:
    config = config_for(folder)
    config.cluster = replace(
        compose(["experiment=smoke_8gpu"]).cluster, gpus_per_node=config.cluster.gpus_per_node
    )
    return config


def row_of(step: int) -> Row:
    row = {"step": step, "loss": 8.0 - step, "tokens": 100, "step_time_s": 0.5, "tokens_per_s": 200.0}
    return row | {"flops": 1e12} | ({"eval_text_loss": 4.0, "eval_caption_loss": 2.0} if step == 6 else {})


def run_steps(config: Config, start: int, stop: int, is_main: bool = True, device_name: str = "CPU") -> None:
    with Report(config, is_main=is_main, device_name=device_name) as report:
        report.start(start)
        if start == 0:
            report.add({"step": 0, "eval_text_loss": 8.0, "eval_caption_loss": 8.5})
        for step in range(start + 1, stop + 1):
            report.add(row_of(step))
        if stop == config.train.steps:
            report.finish()
        else:
            report.stopped(stop, "SIGTERM")


def test_whole_run(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    config = config_for(tmp_path)
    run_steps(config, start=0, stop=6)
    rows = read_rows(tmp_path / "metrics.jsonl")
    assert [row.pop("time_left_s", None) for row in rows] == [
        None,
        *map(pytest.approx, [2.5, 2.0, 1.5, 1.0, 0.5, 0.0]),
    ]
    assert rows == [{"step": 0, "eval_text_loss": 8.0, "eval_caption_loss": 8.5}, *map(row_of, range(1, 7))]
    assert load(tmp_path / "config.yaml") == (config, [])
    assert (tmp_path / "loss.png").stat().st_size > 10_000
    assert list((tmp_path / "tensorboard").glob("events.*"))
    text = capsys.readouterr().out
    assert "step 2/6  loss 6.0000  200 tokens/s  2s left" in text
    assert "8.0000 -> 4.0000 (-50.0%)" in text
    assert "MFU" not in text


def test_utilisation_is_of_all_devices(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    mfu = 1e12 / 0.5 / (4 * 989e12)
    for name, told in (("NVIDIA H800", "4 x H800"), ("NVIDIA H20", "though the device is NVIDIA H20")):
        run_steps(on_gpus(tmp_path / name), start=0, stop=6, device_name=name)
        # A narrow terminal folds the cell.
        cell = " ".join(capsys.readouterr().out.split("MFU")[1].replace("│", " ").split())
        assert f"{mfu:.1%} of" in cell
        assert told in cell


def test_steps_are_held_against_their_plan(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    config = on_gpus(tmp_path)
    config.train.steps = 20
    run_steps(config, start=0, stop=20)
    planned_s = expected_step_s(config)
    rows = read_rows(tmp_path / "metrics.jsonl")
    assert "planned_step_time_s" not in rows[0]
    assert {row["planned_step_time_s"] for row in rows[1:]} == {planned_s}
    assert capsys.readouterr().out.count("% longer than the") == 1


def test_stopped_run_goes_on_where_it_was(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    config = config_for(tmp_path)
    run_steps(config, start=0, stop=4)
    assert "SIGTERM: checkpoint of step 4 saved" in capsys.readouterr().out
    run_steps(config, start=3, stop=6)
    assert "resuming after step 3 of 6" in capsys.readouterr().out
    assert [row["step"] for row in read_rows(tmp_path / "metrics.jsonl")] == list(range(7))


def test_other_ranks_are_silent(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run_steps(config_for(tmp_path), start=0, stop=6, is_main=False)
    assert capsys.readouterr().out == ""
    assert list(tmp_path.iterdir()) == []


def test_a_timeline_that_cannot_be_written_ends_nothing(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    spans = (Span("train", 0.0, 1.0, 0, ""),)
    record = RankRecord(rank=0, stage=0, replica=0, node="a", ready_s=0.0, spans=spans)
    (tmp_path / "trace").write_text("not a folder", encoding="utf-8")
    Report(config_for(tmp_path), is_main=True, device_name="CPU").timeline(3, [record])
    assert re.search(
        r"trace: the timeline of step 3 cannot be written .*File exists", capsys.readouterr().out
    )
    Report(config_for(tmp_path), is_main=False, device_name="CPU").timeline(3, [record])


def test_a_run_folder_that_is_deleted_ends_nothing(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = tmp_path / "run"
    with Report(config_for(folder), is_main=True, device_name="CPU") as report:
        report.start(0)
        for step in range(1, 3):
            report.add(row_of(step))
        shutil.rmtree(folder)
        for step in range(3, 7):
            report.add(row_of(step))
        shutil.rmtree(folder, ignore_errors=True)
        report.finish()
    told = capsys.readouterr().out
    assert told.count("metrics.jsonl: cannot be written (ENOENT") == 1
    assert told.count("tensorboard: cannot be written") <= 1
    assert "no summary, the metrics or their plot are out of reach" in told
    assert [row["step"] for row in read_rows(folder / "metrics.jsonl")] == [3, 4, 5, 6]
