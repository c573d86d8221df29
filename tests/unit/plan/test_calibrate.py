"""Constants that are fitted to runs: known ones are found again, what cannot be told apart stays."""

from dataclasses import replace
from pathlib import Path

import pytest

from k25_train.compose.resolve import compose, load
from k25_train.config.rates import CalibrationConfig
from k25_train.config.schema import Config
from k25_train.plan.calibrate.calibrate import NAMES, calibrate, calibrated
from k25_train.plan.calibrate.device_file import device_file, overrides
from k25_train.plan.calibrate.measured import CalibrationError, MeasuredRun
from k25_train.plan.report.calibration import calibration_lines
from tests.helpers.measured_runs import TRUTH, layout_config, planned_run, write_run

LAYOUTS = (
    {"pp": 4},
    {"pp": 2, "vpp": 2, "dp": 2},
    {"dp": 4},
    {"pp": 2, "ep": 2, "dp": 2},
)


def read(path: Path) -> Config:
    return load(path).config


@pytest.fixture(scope="module")
def runs() -> list[MeasuredRun]:
    """Runs of several layouts, one with two mixes of tokens, and one with longer passes."""
    found = [
        planned_run(str(sizes), layout_config(**sizes), TRUTH, [0.1] if index else [0.0, 0.3])
        for index, sizes in enumerate(LAYOUTS)
    ]
    larger = layout_config("train.micro_batch_size=2", pp=2, dp=2)
    return [*found, planned_run("larger", larger, TRUTH, [0.2])]


def test_known_constants_are_found_again(runs: list[MeasuredRun]) -> None:
    found = calibrated(runs)
    for name in ("kernels", "pass_ms", "step_ms"):
        assert found.constants[name].error is not None
        assert getattr(found.rates.calibration, name) == pytest.approx(getattr(TRUTH, name), rel=1e-6)
    assert max(abs(each.error) for each in found.compared) < 1e-9
    assert max(abs(each.before_s / each.measured.seconds - 1) for each in found.compared) > 0.2


def test_one_run_determines_one_constant(runs: list[MeasuredRun]) -> None:
    found = calibrated(runs[1:2])
    fitted = [name for name in NAMES if found.constants[name].error is not None]
    assert fitted == ["kernels"]
    for name in NAMES[1:]:
        assert found.constants[name].value == getattr(runs[1].config.cluster.rates.calibration, name)
        assert "do not tell it apart" in "\n".join(calibration_lines(found))
    assert found.compared[0].error == pytest.approx(0, abs=1e-9)


def test_equal_layouts_say_as_much_as_one(runs: list[MeasuredRun]) -> None:
    twins = [replace(runs[1], name=f"twin {number}") for number in range(4)]
    found = calibrated(twins)
    assert [name for name in NAMES if found.constants[name].error is not None] == ["kernels"]


def test_a_file_is_a_device_to_choose(runs: list[MeasuredRun], tmp_path: Path) -> None:
    found = calibrated(runs)
    path = tmp_path / "this_machine.yaml"
    path.write_text(device_file(found), encoding="utf-8")
    config = compose(["experiment=smoke", f"device={path}"])
    assert config.cluster.rates.calibration.pass_ms == pytest.approx(TRUTH.pass_ms, rel=1e-5)
    expected = replace(found.rates, calibration=config.cluster.rates.calibration)
    assert config.cluster.rates == expected
    pasted = compose(["experiment=smoke", *overrides(found)])
    assert pasted.cluster.rates.calibration == config.cluster.rates.calibration
    assert device_file(found).count("# fitted, +- ") == 3


def test_folders_are_read_with_noise_and_what_is_left_out(tmp_path: Path) -> None:
    folders = [
        write_run(tmp_path / name, layout_config(**sizes), TRUTH, noise=0.01)
        for name, sizes in zip("abcd", LAYOUTS, strict=True)
    ]
    found = calibrate(folders, read)
    assert found.rates.calibration.kernels == pytest.approx(TRUTH.kernels, rel=0.2)
    # The slow first steps and the time that was waited for data are in none of them.
    assert max(abs(each.error) for each in found.compared) < 0.02
    assert all(0 < run.groups[0].noise < 0.01 for run in found.runs)


def test_constants_below_nothing_are_refused_where_they_matter(runs: list[MeasuredRun]) -> None:
    absurd = CalibrationConfig(kernels=1.7, exchange=1.0, pass_ms=0.0, step_ms=-700.0)
    faster = [
        planned_run(run.name, run.config, absurd, [group.vision_share for group in run.groups])
        for run in runs
    ]
    with pytest.raises(
        CalibrationError, match=r"calibration\.step_ms would be -\d+.* of a step less than nothing"
    ):
        calibrated(faster)
    slightly = replace(absurd, step_ms=-80.0)
    found = calibrated([planned_run(run.name, run.config, slightly, [0.1]) for run in runs])
    assert found.rates.calibration.step_ms == 0
    assert "which makes no sense" in device_file(found)
