"""The bench that puts a run's speed next to published figures, on synthetic runs."""

import json
from pathlib import Path

import pytest

from k25_train.compose.resolve import compose, to_yaml
from tests.bench.throughput import PUBLISHED, main
from tests.helpers.forward_flops import text_forward_flops

TOKENS = 4_194_304


def write_run(folder: Path, experiment: str, times: list[float]) -> None:
    """Steps of 4.2M tokens and 7.2e16 FLOPs, and a row that is no step."""
    folder.mkdir()
    (folder / "config.yaml").write_text(to_yaml(compose([f"experiment={experiment}"])))
    rows = [{"step": 0, "eval_text_loss": 8.0}]
    rows += [
        {"step": step, "loss": 5.0, "tokens": TOKENS, "flops": 7.2e16, "step_time_s": time}
        for step, time in enumerate(times, 1)
    ]
    (folder / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))


def test_the_median_step_is_told_per_gpu(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = tmp_path / "run"
    write_run(run, "moonlight_16b", [500.0, 12.0, 11.0, 90.0, 12.0])
    assert main([str(run)]) == 0
    text = capsys.readouterr().out
    # 7.2e16 / 12 s / 16 GPUs, and 4194304 / 12 / 16.
    assert text.splitlines()[-1] == "375 model TFLOP/s and 21,845 tokens/s per GPU"
    assert "median of 4 steps: 12.000 s, 17.17 GFLOPs a token" in text
    assert "overlap_expert_comm: true" in text, "the configuration is told in full"
    assert "no comparison" not in text
    for each in PUBLISHED:
        assert each.source in text


def test_processes_are_not_compared_with_gpus(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = tmp_path / "run"
    write_run(run, "smoke", [3.0, 2.0, 2.0])
    assert main([str(run)]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[-2] == "no comparison: these ranks are CPU processes, the published ones GPUs"
    assert lines[-1] == "9,000 model TFLOP/s and 524,288 tokens/s per process"


def test_a_run_of_one_step_has_no_speed(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = tmp_path / "run"
    write_run(run, "smoke", [3.0])
    assert main([str(run)]) == 1
    assert "1 steps have been measured, and the first is left out" in capsys.readouterr().err
    assert main([str(tmp_path / "absent")]) == 1
    assert main([]) == 2


def test_published_flops_are_counted_as_ours() -> None:
    """Else TFLOP/s could not be compared; NVIDIA's two figures of Moonlight imply what a token costs."""
    model = compose(["experiment=moonlight_16b"]).model
    ours = 3 * text_forward_flops(model, [4096]) / 4096
    theirs = PUBLISHED[0].tflops * 1e12 / PUBLISHED[0].tokens_per_s
    assert ours == pytest.approx(theirs, rel=2e-3)
