"""Calibration of plans: the constants with which they come closest to the runs of a machine; torch-free."""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, fields, replace
from pathlib import Path

import numpy as np

from k25_train.config.rates import CalibrationConfig, RatesConfig
from k25_train.config.schema import Config
from k25_train.plan.calibrate.fit import Constant, Fitted, Floats, fit
from k25_train.plan.calibrate.measured import CalibrationError, MeasuredRun, read_run
from k25_train.plan.calibrate.planned import Measurement, measurements, planned_s

NAMES = tuple(field.name for field in fields(CalibrationConfig))
ABSURD_SHARE = 0.1
"""Of a step: what a constant that would be negative may amount to before it is an error. Our choice."""
MOST_OFF = 0.5
"""How far off the plan of a run may be after the fit, as a share of what was measured. Our choice."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Compared:
    """A measurement next to plans."""

    measured: Measurement
    before_s: float
    """Planned with the constants so far."""
    after_s: float
    """Planned with those that are fitted."""

    @property
    def error(self) -> float:
        """How far the plan is off after the fit, as a share of the measurement."""
        return self.after_s / self.measured.seconds - 1


@dataclass(frozen=True, slots=True, kw_only=True)
class Calibrated:
    """The result."""

    runs: tuple[MeasuredRun, ...]
    """What it rests on."""
    rates: RatesConfig
    """Of the device, with the constants."""
    constants: Mapping[str, Fitted]
    """What became of each."""
    compared: tuple[Compared, ...]
    """Every measurement next to plans."""


def calibrate(
    folders: Sequence[Path], load: Callable[[Path], Config], *, reads_traces: bool = True
) -> Calibrated:
    """Fit the constants to the runs in these folders.

    Args:
        folders: of runs on the same device, in any layouts.
        load: reads a `config.yaml`.
        reads_traces: whether durations of passes are used where there is a trace.

    Raises:
        CalibrationError: a run has too little to say, runs are of different devices, or what they say makes
            no sense.
        TraceError: a trace is not of its run.
    """
    return calibrated([read_run(folder, load, reads_trace=reads_traces) for folder in folders])


def calibrated(runs: Sequence[MeasuredRun]) -> Calibrated:
    """Fit the constants to runs of one device. Raises `CalibrationError`, see `calibrate`."""
    rates = _common_rates(runs)
    found = [each for run in runs for each in measurements(run)]
    measured = np.array([each.seconds for each in found])

    def predict(values: Floats) -> Floats:
        constants = _constants(values)
        if not (np.all(np.isfinite(values)) and constants.kernels > 0):
            # Nothing runs backwards: a step of the fit that leads here is halved.
            return np.full(len(found), np.inf)
        return np.array([seconds for run in runs for seconds in planned_s(run, constants)])

    # 1. The fit; a millisecond matters by its share of a step.
    to_fit = _to_fit(rates.calibration, min(group.step_s for run in runs for group in run.groups))
    before = predict(np.array([each.start for each in to_fit]))
    _check_finite(found, before)
    noise = np.array([each.noise for each in found])
    fitted = dict(zip(NAMES, fit(predict, measured, noise, to_fit), strict=True))
    # 2. What makes no sense is an error, not a plan.
    _check_constants(fitted)
    values = np.array([each.value for each in fitted.values()])
    compared = tuple(
        Compared(measured=each, before_s=before_s, after_s=after_s)
        for each, before_s, after_s in zip(found, before.tolist(), predict(values).tolist(), strict=True)
    )
    _check_errors(compared)
    return Calibrated(
        runs=tuple(runs),
        rates=replace(rates, calibration=_constants(values)),
        constants=fitted,
        compared=compared,
    )


def _constants(values: Floats) -> CalibrationConfig:
    return CalibrationConfig(**dict(zip(NAMES, values.tolist(), strict=True)))


def _to_fit(start: CalibrationConfig, step_s: float) -> list[Constant]:
    ms = 1000 * step_s
    return [
        Constant(start=start.kernels, least=1e-9, unit=1.0),
        Constant(start=start.exchange, least=0.0, unit=1.0),
        Constant(start=start.pass_ms, least=0.0, unit=1e-3 * ms),
        Constant(start=start.step_ms, least=0.0, unit=ms),
    ]


def _common_rates(runs: Sequence[MeasuredRun]) -> RatesConfig:
    """The rates that all runs were planned with."""
    if not runs:
        raise CalibrationError("no run is given: name the folders of one or several")
    names = [run.name for run in runs]
    twice = sorted({name for name in names if names.count(name) > 1})
    if twice:
        raise CalibrationError(
            f"{', '.join(twice)}: is given twice and would count twice: name each run once"
        )
    first = runs[0].config.cluster.rates
    for run in runs[1:]:
        rates = run.config.cluster.rates
        for field in fields(RatesConfig):
            values = getattr(first, field.name), getattr(rates, field.name)
            if values[0] != values[1]:
                raise CalibrationError(
                    f"{run.name}: has cluster.rates.{field.name}={values[1]}, {runs[0].name} has "
                    f"{values[0]}: one calibration is of one device and starts from one file: calibrate each "
                    "by itself, or train again with the same device=NAME"
                )
    return first


def _check_finite(found: Sequence[Measurement], before: Floats) -> None:
    for each, planned in zip(found, before.tolist(), strict=True):
        if not (math.isfinite(planned) and (planned > 0 or not each.is_step)):
            raise CalibrationError(
                f"{each.run}: the plan says {planned} s for a {each.what}: check the rates of its device file"
            )


REMEDY = (
    "measure on a machine where nothing else runs, more steps, and runs whose layouts differ in micro-"
    "batches and stages"
)


def _check_constants(fitted: Mapping[str, Fitted]) -> None:
    """Raise `CalibrationError` for constants with which nothing can be planned."""
    for name, each in fitted.items():
        if not math.isfinite(each.value) or (name == "kernels" and each.value <= 0):
            raise CalibrationError(f"calibration.{name} would be {each.value:.3g}: {REMEDY}")
        if each.wanted is not None and abs(each.wanted_share) > ABSURD_SHARE:
            raise CalibrationError(
                f"calibration.{name} would be {each.wanted:.3g}, {abs(each.wanted_share):.0%} of a step less "
                f"than nothing: {REMEDY}"
            )


def _check_errors(compared: Sequence[Compared]) -> None:
    """Raise `CalibrationError` if the best plans are far off."""
    worst = max((each for each in compared if each.measured.is_step), key=lambda each: abs(each.error))
    if abs(worst.error) > MOST_OFF:
        raise CalibrationError(
            f"{worst.measured.run}: a {worst.measured.what} took {worst.measured.seconds:.3g} s, the best "
            f"constants say {worst.after_s:.3g} s: these runs are not of one machine, or it was disturbed: "
            f"{REMEDY}, or leave this run out"
        )
