"""The device file that a calibration gives, for `device=FILE.yaml`, and the same as overrides."""

from dataclasses import fields

from k25_train.config.rates import CalibrationConfig, RatesConfig
from k25_train.plan.calibrate.calibrate import Calibrated
from k25_train.plan.calibrate.fit import Fitted


def device_file(found: Calibrated) -> str:
    """The file's text: every rate as the runs had it, and the constants, each with where it comes from."""
    rates = found.rates
    names = ", ".join(run.name for run in found.runs)
    num_steps = sum(group.num_steps for run in found.runs for group in run.groups)
    lines = [
        f"# Rates of {rates.device} as these runs had them; constants fitted by k25-plan calibrate to "
        f"{num_steps} steady steps of {names}."
    ]
    given = [field.name for field in fields(RatesConfig) if field.name != "calibration"]
    lines += [f"{name}: {_scalar(getattr(rates, name))}" for name in given]
    lines.append("calibration:")
    for field in fields(CalibrationConfig):
        value = getattr(rates.calibration, field.name)
        lines.append(f"  {field.name}: {_rounded(value)}  # {origin(found.constants[field.name])}")
    return "\n".join(lines) + "\n"


def overrides(found: Calibrated) -> list[str]:
    """The constants as overrides to paste, in the order of the file."""
    constants = found.rates.calibration
    return [
        f"cluster.rates.calibration.{field.name}={_rounded(getattr(constants, field.name))}"
        for field in fields(CalibrationConfig)
    ]


def origin(constant: Fitted) -> str:
    """Where a constant comes from, in a few words."""
    if constant.error is not None:
        return f"fitted, +- {constant.error:.2g}"
    if constant.wanted is not None:
        return f"as before: these runs would have it at {constant.wanted:.3g}, which makes no sense"
    return "as before: these runs do not tell it apart from the others"


def _scalar(value: float | str | None) -> str:
    return "null" if value is None else str(value)


def _rounded(constant: float) -> str:
    return f"{constant:.6g}"
