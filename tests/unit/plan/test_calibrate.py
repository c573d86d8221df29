"""Constants that are fitted to runs made by the planner: known ones are found, what runs lack is told."""

import math
import sys
from dataclasses import replace
from pathlib import Path

import pytest

from k25_train.compose.resolve import compose, load
from k25_train.config.rates import CalibrationConfig
from k25_train.config.schema import Config
from k25_train.plan.__main__ import main
from k25_train.plan.assumptions import AS_CONFIGURED
from k25_train.plan.calibrate.calibrate import NAMES, Calibrated, calibrate, calibrated
from k25_train.plan.calibrate.device_file import device_file, overrides
from k25_train.plan.calibrate.fit import Fitted
from k25_train.plan.calibrate.measured import CalibrationError, MeasuredRun, read_run, step_groups
from k25_train.plan.calibrate.planned import with_calibration
from k25_train.plan.cause import Cause
from k25_train.plan.pipeline import plan_pipeline
from k25_train.plan.report.calibration import calibration_lines, calibration_table
from k25_train.plan.time.plan_step import plan_step
from tests.helpers.measured_runs import TRUTH, layout_config, planned_run, write_run

LAYOUTS = ({"pp": 4}, {"pp": 2, "vpp": 2, "ep": 2, "dp": 2}, {"dp": 4}, {"pp": 2, "ep": 2, "dp": 2})
LARGE = ("train.global_batch_size=32", "train.micro_batch_size=2")


def read(path: Path) -> Config:
    return load(path).config


@pytest.fixture(scope="module")
def runs() -> list[MeasuredRun]:
    """Runs of several layouts, one with two mixes of tokens, and one with longer passes."""
    found = [
        planned_run(str(sizes), layout_config(**sizes), TRUTH, [0.1] if index else [0.0, 0.3])
        for index, sizes in enumerate(LAYOUTS)
    ]
    return [*found, planned_run("large", layout_config(*LARGE, pp=2, dp=2), TRUTH, [0.0])]


@pytest.fixture(scope="module")
def found(runs: list[MeasuredRun]) -> Calibrated:
    return calibrated(runs)


def test_known_constants_are_found_again(found: Calibrated) -> None:
    for name in NAMES:
        assert found.constants[name].error is not None, name
        assert getattr(found.rates.calibration, name) == pytest.approx(getattr(TRUTH, name), rel=1e-6)
    assert max(abs(each.error) for each in found.compared) < 1e-9
    assert max(abs(each.before_s / each.measured.seconds - 1) for each in found.compared) > 0.2


def test_a_file_is_a_device_to_choose(found: Calibrated, tmp_path: Path) -> None:
    path = tmp_path / "this_machine.yaml"
    path.write_text(device_file(found), encoding="utf-8")
    config = compose(["experiment=smoke", f"device={path}"])
    assert config.cluster.rates.calibration.pass_ms == pytest.approx(TRUTH.pass_ms, rel=1e-5)
    expected = replace(found.rates, calibration=config.cluster.rates.calibration)
    assert config.cluster.rates == expected
    pasted = compose(["experiment=smoke", *overrides(found)])
    assert pasted.cluster.rates.calibration == config.cluster.rates.calibration
    assert device_file(found).count("# fitted, +- ") == len(NAMES)


def test_plans_are_of_what_runs_measure() -> None:
    config = layout_config(pp=2, dp=2)
    run = planned_run("run", config, TRUTH, [0.0, 0.3])
    for group in run.groups:
        assumed = replace(AS_CONFIGURED, vision_share=group.vision_share)
        plan = plan_step(plan_pipeline(with_calibration(config, TRUTH), assumptions=assumed))
        apart_s = sum(part.seconds for part in plan.parts if part.cause in (Cause.data, Cause.checkpoint))
        assert group.step_s == pytest.approx(plan.step_s - apart_s)
        assert apart_s > 0
    assert run.groups[0].step_s < run.groups[1].step_s


def test_the_table_has_every_measurement(found: Calibrated) -> None:
    assert calibration_table(found).row_count == len(LAYOUTS) + 2
    assert "off by 0.0% at most" in "\n".join(calibration_lines(found))


def test_one_run_determines_one_constant(runs: list[MeasuredRun]) -> None:
    found = calibrated(runs[1:2])
    assert [name for name in NAMES if found.constants[name].error is not None] == ["kernels"]
    assert found.rates.calibration.pass_ms == 0
    assert "\n".join(calibration_lines(found)).count("do not tell it apart") == 3
    assert found.compared[0].error == pytest.approx(0, abs=1e-9)


def test_folders_are_read_with_noise_and_without_what_does_not_count(tmp_path: Path) -> None:
    truth = CalibrationConfig(kernels=1.7, exchange=1.0, pass_ms=0.0, step_ms=0.0)
    folders = [
        write_run(tmp_path / name, layout_config(**sizes), truth, noise=0.01)
        for name, sizes in zip("ab", LAYOUTS, strict=False)
    ]
    found = calibrate(folders, read)
    # The slow first steps and the time that was waited for data are in none of them.
    assert found.rates.calibration.kernels == pytest.approx(1.7, rel=0.02)
    assert all(0 < run.groups[0].noise < 0.01 for run in found.runs)


def test_smaller_steps_of_a_ramp_do_not_count(tmp_path: Path) -> None:
    def with_ramp(path: Path) -> Config:
        config = read(path)
        ramp = replace(config.train.batch_ramp, start=config.train.global_batch_size // 2, length=10)
        ramp = replace(ramp, increment=config.train.global_batch_size // 2)
        return replace(config, train=replace(config.train, batch_ramp=ramp))

    folder = write_run(tmp_path / "run", layout_config(dp=4), TRUTH)
    whole, ramped = (read_run(folder, load_config).groups[0].num_steps for load_config in (read, with_ramp))
    # Of either, the first ones are left out, too.
    assert whole - ramped == 10


def test_the_command_writes_a_device_file_and_nothing_over_another(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def status(*words: object) -> int:
        monkeypatch.setattr(sys, "argv", ["k25-plan", "calibrate", *map(str, words)])
        try:
            main()
        except SystemExit as end:
            return int(end.code or 0)
        return 0

    truth = CalibrationConfig(kernels=1.7, exchange=0.0, pass_ms=0.0, step_ms=0.0)
    run, device = write_run(tmp_path / "run", layout_config(dp=4), truth), tmp_path / "device.yaml"
    assert status(run, "--out", device) == 0
    printed = capsys.readouterr().out
    assert "cluster.rates.calibration.kernels=1.7 " in printed
    assert f"device={device}" in printed
    assert "kernels: 1.7  # fitted" in device.read_text()
    for out, told in (
        (device, "exists already: give another name"),
        (tmp_path / "device", "takes names that end with .yaml: use "),
        (tmp_path / "nowhere" / "device.yaml", "give a path in a folder that is there"),
    ):
        assert status(run, "--out", out) == 2
        assert told in capsys.readouterr().err.replace("\n", " ")
    assert status(tmp_path / "typo") == 2
    assert "so no run has trained here" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("wrong", "told"),
    [
        (
            {"step_ms": Fitted(value=0.0, wanted=-400.0, wanted_share=-0.3)},
            "step_ms would be -400, 30% of a step",
        ),
        ({"kernels": Fitted(value=-0.1, error=0.1)}, r"kernels would be -0\.1: measure on a machine"),
        ({"exchange": Fitted(value=math.nan, error=0.1)}, "exchange would be nan: measure on a machine"),
    ],
)
def test_absurd_constants_are_refused(
    wrong: dict[str, Fitted], told: str, runs: list[MeasuredRun], monkeypatch: pytest.MonkeyPatch
) -> None:
    found = {name: Fitted(value=1.0, error=0.1) for name in NAMES} | wrong
    monkeypatch.setattr("k25_train.plan.calibrate.calibrate.fit", lambda *_: list(found.values()))
    with pytest.raises(CalibrationError, match=told):
        calibrated(runs[1:2])


def test_runs_that_contradict_each_other_are_refused(runs: list[MeasuredRun]) -> None:
    group = runs[1].groups[0]
    slow = replace(runs[1], name="slow", groups=(replace(group, step_s=10 * group.step_s),))
    with pytest.raises(CalibrationError, match="not of one machine, or it was disturbed"):
        calibrated([runs[1], slow])


def test_runs_of_several_devices_are_refused(runs: list[MeasuredRun]) -> None:
    other = layout_config("cluster.rates.float32_tflops=0.5", dp=4)
    with pytest.raises(
        CalibrationError, match=r"other: has cluster\.rates\.float32_tflops=0\.5, .* has 0\.0004"
    ):
        calibrated([runs[0], replace(runs[1], name="other", config=other)])
    with pytest.raises(CalibrationError, match="given twice"):
        calibrated([runs[0], runs[0]])
    with pytest.raises(CalibrationError, match="no run is given"):
        calibrated([])


def test_missing_and_damaged_files_are_named(tmp_path: Path) -> None:
    folder = write_run(tmp_path / "run", layout_config(dp=4), TRUTH)
    metrics, whole = folder / "metrics.jsonl", (folder / "metrics.jsonl").read_text()
    # 1. Lines that are no rows are left out, as everywhere, and so are rows without times.
    metrics.write_text(whole + '{"step": 25, "step_time_s": null}\n{"step": 26, "step_ti\nnothing\n')
    assert read_run(folder, read).groups[0].num_steps == 21
    # 2. What leaves too few steps is told.
    metrics.write_text("".join(whole.splitlines(keepends=True)[:7]))
    with pytest.raises(CalibrationError, match=r"run: metrics\.jsonl has 3 steady steps, 4 are needed"):
        read_run(folder, read)
    metrics.write_text("\x00" * 100)
    with pytest.raises(CalibrationError, match="has 0 steady steps"):
        read_run(folder, read)
    metrics.unlink()
    with pytest.raises(CalibrationError, match=r"has no metrics\.jsonl"):
        read_run(folder, read)
    (folder / "config.yaml").write_text("steps: 3\n")
    metrics.write_text(whole)
    with pytest.raises(CalibrationError, match=r"config\.yaml: is not what a run wrote: \d+ problems"):
        read_run(folder, read)
    with pytest.raises(CalibrationError, match=r"has no config\.yaml"):
        read_run(tmp_path, read)


def test_steps_are_grouped_by_their_share_of_images() -> None:
    rows = [
        {
            "step": step,
            "tokens": 100,
            "vision_tokens": 30 * (step % 2),
            "step_time_s": 1 + step % 2,
            "data_wait_s": 0,
        }
        for step in range(1, 31)
    ]
    groups = step_groups(rows, 7, "run")
    assert sum(group.num_steps for group in groups) == 30 - 3 - 1, "without the first and the traced one"
    few, many = groups[0], groups[-1]
    assert (few.vision_share, few.step_s) == (0.0, 1.0)
    assert (many.vision_share, many.step_s) == (0.3, 2.0)
    alike = [row | {"vision_tokens": 30 + step % 3} for step, row in enumerate(rows)]
    (group,) = step_groups(alike, None, "run")
    assert group.num_steps == 27
