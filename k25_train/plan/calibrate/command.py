"""`k25-plan calibrate RUN …`: fit constants to runs, print what they are worth, write a device file."""

import argparse
from collections.abc import Callable
from pathlib import Path

from rich.console import Console

from k25_train.config.schema import Config
from k25_train.plan.calibrate.calibrate import calibrate
from k25_train.plan.calibrate.device_file import device_file
from k25_train.plan.calibrate.measured import CalibrationError
from k25_train.plan.report.calibration import calibration_lines, calibration_table


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
