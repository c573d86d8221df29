"""`k25-plan calibrate RUN …`: fit constants to runs, print what they are worth, write a device file."""

import argparse
from collections.abc import Callable
from pathlib import Path

from rich.console import Console
from rich.table import Table

from k25_train.config.schema import Config
from k25_train.plan.calibrate.calibrate import Calibrated, calibrate
from k25_train.plan.calibrate.device_file import device_file, origin, overrides
from k25_train.plan.calibrate.measured import CalibrationError


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the words after `calibrate`."""
    parser.add_argument("runs", nargs="+", type=Path, metavar="RUN", help="folder of a run that has trained")
    parser.add_argument("--out", type=Path, metavar="FILE", help="write a device file, for device=FILE")
    parser.add_argument("--no-trace", action="store_true", help="do not use durations of traced passes")


def run_calibrate(options: argparse.Namespace, console: Console, load: Callable[[Path], Config]) -> int:
    """Calibrate and print; `load` reads a `config.yaml`. Returns the exit status.

    Raises `CalibrationError` and `TraceError`, see `calibrate`, or if the file cannot be written.
    """
    out: Path | None = options.out
    # Before anything is fitted.
    if out is not None and out.suffix != ".yaml":
        raise CalibrationError(f"--out {out}: device=FILE takes names that end with .yaml: use {out}.yaml")
    if out is not None and out.exists():
        raise CalibrationError(f"--out {out}: exists already: give another name, or move it away first")
    found = calibrate(options.runs, load, reads_traces=not options.no_trace)
    console.print(calibration_table(found))
    for line in calibration_lines(found):
        console.print(line, markup=False, highlight=False, soft_wrap=True)
    if out is not None:
        try:
            out.write_text(device_file(found), encoding="utf-8")
        except OSError as error:
            raise CalibrationError(
                f"--out {out}: cannot be written ({error.strerror}): give a path in a folder that is there"
            ) from error
        console.print(f"written: {out}, for device={out}", markup=False, highlight=False, soft_wrap=True)
    return 0


def calibration_table(found: Calibrated) -> Table:
    """Every measurement, what plans said of it before and say now."""
    table = Table("run", "what", "measured", "planned before", "planned now", "off by", title_justify="left")
    for each in found.compared:
        measured = each.measured
        table.add_row(
            measured.run,
            measured.what,
            f"{measured.seconds:.4g} s" + (f" ± {measured.noise:.1%}" if measured.is_step else ""),
            f"{each.before_s:.4g} s",
            f"{each.after_s:.4g} s",
            f"{each.error:+.1%}",
        )
    return table


def calibration_lines(found: Calibrated) -> list[str]:
    """The constants, where each comes from, and the overrides to paste."""
    lines = [f"{name}: {each.value:.6g} ({origin(each)})" for name, each in found.constants.items()]
    worst = max(abs(each.error) for each in found.compared if each.measured.is_step)
    return [*lines, f"plans of these runs are off by {worst:.1%} at most", "", " \\\n".join(overrides(found))]
