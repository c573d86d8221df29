"""A run is seen while its metrics are appended to, cut, replaced or not there yet, here and behind URLs."""

from __future__ import annotations

import io
import json
import os
import threading
from pathlib import Path
from typing import Any

import fsspec
import pytest
from rich.console import Console

from k25_train.errors import ConfigError, MachineError
from k25_train.metrics import __main__ as metrics
from k25_train.metrics.watch import files, following
from k25_train.metrics.watch.command import Watched
from k25_train.metrics.watch.files import file_of
from k25_train.metrics.watch.following import Followed
from k25_train.metrics.watch.seen import Settings, seen
from k25_train.metrics.watch.sparkline import ASCII, BLOCKS, sparkline
from k25_train.metrics.watch.view import view_of
from tests.helpers.in_process import status_of_command

FULL = {
    "loss": 2.5,
    "loss/text": 2.25,
    "grad_norm": 1.0,
    "grad_norm/vision_tower": 0.5,
    "weight_norm/vision_tower": 42.0,
    "lr": 3e-4,
    "batch": 8,
    "seq_len": 4096,
    "padding_share": 0.125,
    "vision_ratio": 0.2,
    "expert_load": 1.75,
    "expert_loads": [1.5, 1.75],
    "dead_experts": 2,
    "expert_bias": 0.01,
    "expert_bias_change": -0.001,
    "max_logit": 55.5,
    "heads_clipped": 3,
    "memory_peak_allocated_bytes": 60e9,
    "memory_planned_bytes": 66e9,
    "tokens_per_s": 1000.0,
    "tokens_per_s_per_gpu": 250.0,
    "mfu": 0.37,
    "step_time_s": 2.0,
    "planned_step_time_s": 1.6,
    "data_wait_s": 0.5,
    "time_left_s": 7200.0,
    "alarm/loss_spike": 2.5,
    "alarm_usual/loss_spike": 1.5,
}


def lines(*steps: int, **more: float) -> bytes:
    return b"".join(
        json.dumps({"step": step, "loss": 1 / (step + 1), **more}).encode() + b"\n" for step in steps
    )


def steps_of(followed: Followed) -> list[Any]:
    return [row["step"] for row in followed.rows]


@pytest.fixture(params=["local", "memory"])
def place(request: pytest.FixtureRequest, tmp_path: Path) -> Any:
    """A run folder, and how its metrics are written: to disk, or to fsspec's memory."""
    if request.param == "local":
        return str(tmp_path), (tmp_path / "metrics.jsonl").write_bytes, (tmp_path / "metrics.jsonl").unlink
    url = f"memory://{tmp_path.name}/run"
    fs, path = fsspec.core.url_to_fs(f"{url}/metrics.jsonl")
    return url, lambda data: fs.pipe_file(path, data), lambda: fs.rm(path)


def test_rows_come_as_they_are_appended_and_half_a_line_waits(place: Any) -> None:
    where, write, _ = place
    followed = Followed(file_of(where))
    assert not followed.poll() and not followed.exists
    data = lines(1, 2)
    write(data + b'{"step": 3, "lo')
    assert followed.poll() and steps_of(followed) == [1, 2]
    assert not followed.poll()
    write(data + b'{"step": 3, "loss": 0.5}\n')
    assert followed.poll() and steps_of(followed) == [1, 2, 3]
    assert followed.num_damaged == 0


def test_a_file_that_is_cut_replaced_or_removed_is_read_anew(place: Any) -> None:
    where, write, remove = place
    followed = Followed(file_of(where))
    write(lines(1, 2, 3, 4))
    followed.poll()
    # A resumed run drops rows and writes others: the file is longer than before when it is looked at.
    write(lines(1, 2) + lines(3, 4, 5, lr=1.0))
    assert followed.poll() and steps_of(followed) == [1, 2, 3, 4, 5]
    assert followed.rows[2]["lr"] == 1.0
    write(lines(1, 2))
    assert followed.poll() and steps_of(followed) == [1, 2]
    # As long as before.
    write(lines(1, 3))
    assert followed.poll() and steps_of(followed) == [1, 3]
    remove()
    assert followed.poll() and steps_of(followed) == [] and not followed.exists
    write(lines(7))
    assert followed.poll() and steps_of(followed) == [7]
    write(b"")
    assert followed.poll() and steps_of(followed) == [] and followed.exists


def test_lines_that_are_no_rows_are_counted(place: Any) -> None:
    where, write, _ = place
    write(lines(1) + b"\xff\xfe\n[]\n{\n\n" + lines(2) + b'{"step": "x"}\n')
    followed = Followed(file_of(where))
    followed.poll()
    assert steps_of(followed) == [1, 2] and followed.num_damaged == 4


def test_of_a_long_file_the_end_is_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(following, "MOST_BYTES", 100)
    (tmp_path / "metrics.jsonl").write_bytes(lines(*range(100)))
    followed = Followed(file_of(str(tmp_path / "metrics.jsonl")))
    followed.poll()
    assert steps_of(followed)[-1] == 99 and 1 < len(followed.rows) < 5 and followed.num_damaged == 0
    with (tmp_path / "metrics.jsonl").open("ab") as file:
        file.write(b"garbage\n")
    assert followed.poll() and followed.num_damaged == 1


def test_a_server_that_fails_is_asked_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    url = f"memory://{tmp_path.name}/run"
    fs, path = fsspec.core.url_to_fs(f"{url}/metrics.jsonl")
    fs.pipe_file(path, lines(1, 2))
    watched = Watched(url)
    watched.look()

    def refuse(*_: object, **__: object) -> None:
        raise ConnectionError("reset by peer")

    with monkeypatch.context() as broken:
        broken.setattr(type(fs), "info", refuse)
        assert watched.look() and "ConnectionError: reset by peer" in watched.trouble
        assert watched.seen().step == 2
        with pytest.raises(MachineError, match="cannot be read"):
            file_of(url).num_bytes()
    assert watched.look() and watched.trouble == ""


def test_a_pipe_or_a_folder_of_that_name_is_no_file(tmp_path: Path) -> None:
    (tmp_path / "metrics.jsonl").mkdir()
    with pytest.raises(MachineError, match="Is a directory"):
        Followed(files.file_of(str(tmp_path))).poll()
    (tmp_path / "other").mkdir()
    os.mkfifo(tmp_path / "other/metrics.jsonl")
    with pytest.raises(MachineError):
        files.file_of(str(tmp_path / "other")).read(1, 5)


def text_of(rows: list[Any], width: int = 100, encoding: str = "utf-8", steps: int | None = 100) -> str:
    stream = io.TextIOWrapper(io.BytesIO(), encoding=encoding, errors="strict", newline="")
    console = Console(file=stream, width=width, color_system=None, force_terminal=False)
    found = seen("runs/x", rows, Settings(model="tiny", steps=steps))
    console.print(view_of(found, width, encoding))
    stream.flush()
    stream.seek(0)
    return stream.read()


def test_the_view_tells_everything_that_rows_do() -> None:
    rows = [{"step": 0, "eval_text_loss": 5.0}, *({"step": s, **FULL} for s in range(1, 41))]
    text = text_of([*rows, {"step": 41, **FULL, "eval_text_loss": 4.5, "eval_loss/text": 4.25}])
    for words in (
        "41 of 100, 41%, 2h00m left", "2.5000", "held-out text", "4.5000", "of source text", "4.2500",
        "text 2.2500", "vision_tower 0.5", "vision_tower 42", "0.0003",
        "8 x 4,096 tokens, 12.5% padding, 20.0%",
        "1.75 max/mean, 2 dead, bias 0.01 (-0.001)", "largest logit 55.5, 3 heads clipped",
        "60.0 GB of 66.0 planned", "1,000 tokens/s, 250 per GPU, MFU 37.0%",
        "2 s, +25% of 1.6 s planned, 0.50 s waiting for data",
        "alarm: step 41: loss spike: the loss is 2.5 nats",
    ):  # fmt: skip
        assert words in text, words


@pytest.mark.parametrize("width", [20, 40, 200])
def test_the_view_fits_any_width_and_rows_of_any_version(width: int) -> None:
    for rows in (
        [],
        [{"step": 3}],
        [{"step": 1, "loss": None, "grad_norm": None}],
        [{"step": 1, "loss": 2.0, "grad_norm": 1.0, "lr": 1e-3, "tokens_per_s": 5.0, "step_time_s": 1.0}],
        [{"step": 1, **FULL}],
    ):
        text = text_of(rows, width)
        assert max(map(len, text.splitlines())) <= width
        assert "step" in text


def test_curves_have_signs_that_the_terminal_knows() -> None:
    assert text_of([{"step": s, "loss": 9.0 - s} for s in range(1, 9)], encoding="ascii").isascii()
    assert sparkline([1, 2, 3, 4, 5, 6, 7, 8], 8) == BLOCKS
    assert sparkline([8, 7, 6, 5, 4, 3, 2, 1], 8, "ascii") == ASCII[::-1]
    assert sparkline([1.0] * 99, 10) == BLOCKS[0] * 10
    assert sparkline([], 5) == sparkline([1.0], 0) == ""
    # One outlier flattens nothing.
    assert len(set(sparkline([*range(50), 1e9], 40))) == len(BLOCKS)


def test_json_holds_the_latest(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "metrics.jsonl").write_bytes(lines(1) + json.dumps({"step": 2, **FULL}).encode() + b"\n")
    (tmp_path / "config.yaml").write_text("model: {name: tiny}\ntrain: {steps: 9}\n")
    assert status_of_command(metrics.main, "watch", str(tmp_path), "--once", "--json") == 0
    found = json.loads(capsys.readouterr().out)
    assert (found["model"], found["step"], found["steps"], found["loss"]) == ("tiny", 2, 9, 2.5)
    assert found["alarms"][0]["kind"] == "loss_spike" and found["format_version"] == 1
    assert found["latest"]["expert_load"] == 1.75


@pytest.mark.parametrize("config", ["a: [", "train: 7", "train: {steps: x}", "\0", ""])
def test_a_configuration_that_is_none_costs_nothing(tmp_path: Path, config: str) -> None:
    (tmp_path / "metrics.jsonl").write_bytes(lines(1))
    (tmp_path / "config.yaml").write_text(config)
    watched = Watched(str(tmp_path))
    watched.look()
    assert watched.seen().steps is None and watched.seen().step == 1


def test_it_follows_until_the_last_step(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "config.yaml").write_text("train: {steps: 3}\n")

    def train() -> None:
        with (tmp_path / "metrics.jsonl").open("ab", buffering=0) as file:
            for step in (1, 2, 3):
                file.write(lines(step))

    later = threading.Timer(0.3, train)
    later.start()
    assert status_of_command(metrics.main, "watch", str(tmp_path), "--interval", "0.1", "--json") == 0
    later.join()
    last = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert last["step"] == 3


def test_any_file_of_rows_is_followed(tmp_path: Path) -> None:
    for name in ("other.jsonl", "rows.log"):
        path = tmp_path / name
        path.write_bytes(b'{"step": 1, "loss": 2.5}\nnonsense\n')
        watched = Watched(str(path))
        assert watched.look()
        assert (watched.seen().num_rows, watched.seen().num_damaged) == (1, 1)
    assert file_of("memory://bucket/other.jsonl").name == "memory://bucket/other.jsonl"
    assert file_of("memory://bucket/other.jsonl", "config.yaml").name == "memory://bucket/config.yaml"


def test_a_url_without_a_place_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"s3://: names no run\n  -> write s3://BUCKET/FOLDER"):
        file_of("s3://")
