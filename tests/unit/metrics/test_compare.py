"""Runs next to each other: positions, chains of stages, differences at common steps, the picture."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from k25_train.errors import DataError
from k25_train.metrics import __main__ as metrics
from k25_train.metrics.compare.differences import figures_at_the_end, losses_at_steps
from k25_train.metrics.compare.picture import plot_runs
from k25_train.metrics.compare.runs import Axis, load_runs
from tests.helpers.in_process import status_of_command


def write(folder: Path, steps: range, init_from: str | None = None, **more: Any) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    rows = [
        {"step": step, "loss": 10.0 / step, "tokens": 100, "step_time_s": 36.0, "grad_norm/vision_tower": 0.5}
        | {key: value(step) if callable(value) else value for key, value in more.items()}
        for step in steps
    ]
    (folder / "metrics.jsonl").write_text("".join(f"{json.dumps(row)}\n" for row in rows))
    (folder / "config.yaml").write_text(json.dumps({"checkpoint": {"init_from": init_from}}))
    return folder


@pytest.fixture
def chain(tmp_path: Path) -> list[str]:
    """Three stages, given in another order, and a run of its own."""
    first = write(tmp_path / "runs/vit", range(1, 11))
    second = write(tmp_path / "runs/joint", range(1, 21), f"{first}/checkpoints/step_8")
    third = write(tmp_path / "runs/mid", range(1, 6), f"{second}/checkpoints/latest")
    return [str(each) for each in (third, first, second, write(tmp_path / "other/alone", range(1, 4)))]


@pytest.mark.parametrize(
    ("axis", "starts"),
    [("step", [28, 0, 8, 0]), ("tokens", [2800, 0, 800, 0]), ("hours", [0.28, 0, 0.08, 0])],
)
def test_a_stage_begins_where_its_weights_came_from(chain: list[str], axis: str, starts: list[float]) -> None:
    runs = load_runs(chain, Axis(axis))
    assert [run.start for run in runs] == pytest.approx(starts)
    assert runs[0].points("loss")[0][0] == pytest.approx(starts[0] + starts[2] / 8)


def test_runs_that_started_from_each_other_or_from_nowhere_end(tmp_path: Path) -> None:
    a = write(tmp_path / "a", range(1, 4), str(tmp_path / "b/checkpoints/step_1"))
    b = write(tmp_path / "b", range(1, 4), str(tmp_path / "a/checkpoints/step_2"))
    assert len(load_runs([str(a), str(b)], Axis.step)) == 2
    c = write(tmp_path / "c", range(1, 4), "s3://bucket/elsewhere/step_5")
    assert load_runs([str(c)], Axis.step)[0].start == 0


def test_runs_of_one_name_are_told_apart(tmp_path: Path) -> None:
    places = [str(write(tmp_path / side / "smoke", range(1, 4))) for side in ("x", "y")]
    assert [run.name for run in load_runs(places, Axis.step)] == places
    assert [run.name for run in load_runs([f"{places[0]}/metrics.jsonl"], Axis.step)] == ["smoke"]


def test_differences_are_those_at_common_steps(tmp_path: Path) -> None:
    a = write(tmp_path / "a", range(1, 31), eval_text_loss=2.0)
    b = write(tmp_path / "b", range(5, 21), loss=lambda step: 11.0 / step, mfu=0.5)
    runs = load_runs([str(a), str(b)], Axis.step)
    losses = losses_at_steps(runs)
    assert [each.step for each in losses] == [6, 8, 10, 12, 14, 16, 18, 20]
    assert all(each.off(1) == pytest.approx(0.1) for each in losses)
    found = {each.figure: each for each in figures_at_the_end(runs)}
    assert found["loss"].step == 20 and found["loss"].values == pytest.approx((0.5, 0.55))
    assert "mfu" not in found and "eval_text_loss" not in found
    assert found["grad_norm/vision_tower"].off(1) == pytest.approx(0.0)


def test_rows_that_lack_what_others_have_are_left_out(tmp_path: Path) -> None:
    a = write(tmp_path / "a", range(1, 4), loss=lambda step: None if step == 2 else 1.0)
    (tmp_path / "a/metrics.jsonl").open("a").write('garbage\n[]\n{"step": 9, "expert_loads": [1, 2]}\n{"ste')
    [run] = load_runs([str(a)], Axis.tokens)
    assert run.points("loss") == ([100, 300], [1.0, 1.0])
    assert run.points("expert_loads") == ([], [])
    plot_runs([run], tmp_path / "one.png", Axis.tokens)


@pytest.mark.parametrize("content", [None, b"", b"\xff\n", b"{}\n"])
def test_a_run_without_a_row_is_named(tmp_path: Path, content: bytes | None) -> None:
    if content is not None:
        (tmp_path / "metrics.jsonl").write_bytes(content)
    with pytest.raises(DataError, match="has no row yet" if content is not None else "is not there"):
        load_runs([str(tmp_path)], Axis.step)


def test_the_command_prints_and_draws(
    chain: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    picture = tmp_path / "runs.png"
    for width in ("20", "120"):
        monkeypatch.setenv("COLUMNS", width)
        assert status_of_command(metrics.main, "compare", *chain, "--png", str(picture), "--x", "hours") == 0
        assert "losses at common steps" in " ".join(capsys.readouterr().out.split())
    with Image.open(picture) as image:
        assert image.width > 1000 and len(image.convert("RGB").resize((200, 200)).getcolors(40_000)) > 20
    assert status_of_command(metrics.main, "compare", *chain, "--json") == 0
    found = json.loads(capsys.readouterr().out)
    assert [run["start"] for run in found["runs"]] == [28, 0, 8, 0]
    assert found["losses"][0] == {"figure": "loss", "step": 1, "values": [10.0] * 4}
    assert status_of_command(metrics.main, "compare", chain[0], "--png", f"{tmp_path}/no/x.png") == 2
    assert "cannot be written: No such file" in capsys.readouterr().err


def test_runs_without_a_common_step_say_so(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    places = [str(write(tmp_path / "a", range(1, 4))), str(write(tmp_path / "b", range(7, 9)))]
    assert status_of_command(metrics.main, "compare", *places) == 0
    assert "no step with a loss in common" in capsys.readouterr().out
