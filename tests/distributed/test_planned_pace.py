"""A run's rows have the planned time of a step: close to the measured one once the plan is calibrated, and
told once where it is not.

Ranks are paced: passes last as long as they would on a device whose rate the planner is not told.
"""

from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path
from statistics import median
from typing import Any

import pytest

from k25_train.compose.resolve import load
from k25_train.metrics.pace import COMPARED_STEPS, PLANNED, TOLERANCE, WARM_UP_STEPS
from k25_train.plan.calibrate.calibrate import calibrate
from k25_train.plan.calibrate.device_file import device_file
from k25_train.run_folder.rows_file import number, read_rows
from tests.helpers.paced_ranks import Clock, at_pace, leaping_clock, slow_down
from tests.helpers.ranks import RankContext, run_ranks
from tests.helpers.runs import layout, overrides, start_run
from tests.helpers.smoke_mix import mix

pytestmark = pytest.mark.distributed

NUM_STEPS = WARM_UP_STEPS + COMPARED_STEPS + 2
SHORT = [
    "optim=adamw",
    "optim.warmup=1",
    "optim.decay=1",
    f"train.steps={NUM_STEPS}",
    f"train.eval_interval={NUM_STEPS}",
    f"checkpoint.interval={NUM_STEPS}",
    "train.eval_sequences=2",
    "train.global_batch_size=2",
    "cluster.host_copy_gb_per_s=1000",
    *mix(text=0.6, caption=0.4),
]
SERIAL, PIPELINE = layout(), layout(pp=2)
PACES = {1: 2e-4, 2: 5e-4}
"""Ranks -> rate of their device: so low that what the machine is busy with otherwise is not seen."""


def fit_paced(context: RankContext, arguments: Sequence[str]) -> list[str]:
    """Train as the command does; returns what was told of its pace."""
    from k25_train.metrics.report import Report
    from k25_train.training.trainer import Trainer

    run = start_run(context, arguments)
    report, told = Report(run.config, is_main=run.is_main, device_name="cpu"), list[str]()
    keep = report.progress.print

    def note(text: str, *more: Any, **options: Any) -> None:
        told.append(text)
        keep(text, *more, **options)

    report.progress.print = note  # type: ignore[method-assign]
    with ExitStack() as contexts:
        # A single rank need not really wait.
        clock = Clock(contexts.enter_context(leaping_clock())) if context.world_size == 1 else Clock()
        slow_down(run, clock, at_pace(run.config, PACES[context.world_size]))
        clock.is_slow = True
        for each in (report, run.data, run.claim):
            contexts.enter_context(each)
        Trainer(run, report).fit()
    return [text for text in told if "planned" in text]


def measured_and_planned(run: Path) -> tuple[float, list[float]]:
    """The median step, and what its rows have as planned."""
    rows = [row for row in read_rows(run / "metrics.jsonl") if row["step"] > WARM_UP_STEPS]
    return median(number(row["step_time_s"]) for row in rows), [
        number(row[PLANNED]) for row in rows if PLANNED in row
    ]


@pytest.mark.parametrize(
    "sizes", [SERIAL, pytest.param(PIPELINE, marks=pytest.mark.slow)], ids=["one rank", "two stages"]
)
def test_a_calibrated_run_is_as_fast_as_planned_and_one_that_is_not_says_so_once(
    sizes: list[str], data: Path, tmp_path: Path
) -> None:
    num_ranks = 2 if sizes is PIPELINE else 1

    def fit(name: str, *more: str) -> list[str]:
        arguments = overrides(data, tmp_path / name, *sizes, *SHORT, *more)
        return run_ranks(fit_paced, num_ranks, arguments, timeout_s=300.0)[0]

    # 1. Nothing is planned for CPUs that nobody has calibrated.
    assert not fit("first")
    assert measured_and_planned(tmp_path / "first")[1] == []
    found = calibrate([tmp_path / "first"], lambda path: load(path).config)
    device = tmp_path / "machine.yaml"
    device.write_text(device_file(found), encoding="utf-8")
    # 2. The same machine, another batch.
    assert not fit("second", f"device={device}", "train.global_batch_size=3")
    measured_s, planned_s = measured_and_planned(tmp_path / "second")
    assert len(planned_s) == NUM_STEPS - WARM_UP_STEPS
    assert planned_s[0] == pytest.approx(measured_s, rel=TOLERANCE)
    # 3. A plan that takes the machine for slower.
    slower = f"cluster.rates.calibration.kernels={1.4 * found.rates.calibration.kernels}"
    (text,) = fit("third", f"device={device}", slower)
    assert "shorter than the" in text
