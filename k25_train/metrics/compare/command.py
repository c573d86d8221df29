"""`k25-metrics compare`: several runs next to each other, as a table of differences and as a picture."""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rich.console import Console

from k25_train.errors import ConfigError, MachineError
from k25_train.metrics.compare.differences import Compared, cells, figures_at_the_end, losses_at_steps
from k25_train.metrics.compare.runs import Axis, ComparedRun, load_runs
from k25_train.tables import fitting_table

FORMAT_VERSION = 1
"""Of the JSON."""
_EPILOG = """\
A run whose checkpoint.init_from lies in the folder of another one is drawn behind it, with a line between the
two stages. Percentages are differences from the first run at the same step of its own count.
"""


def add(commands: Any) -> None:
    """Declare the command."""
    parser = commands.add_parser(
        "compare",
        help="compare runs",
        description=(__doc__ or "").partition(":")[2].strip(),
        epilog=_EPILOG,
    )
    parser.add_argument(
        "runs",
        metavar="RUN",
        nargs="+",
        help="run folders or their metrics.jsonl, as paths or URLs that fsspec knows (s3://…)",
    )
    parser.add_argument("--png", type=Path, metavar="FILE", help="draw all of them into a picture")
    parser.add_argument(
        "--x",
        choices=[axis.value for axis in Axis],
        default=Axis.step.value,
        help="along what the picture draws them (%(default)s)",
    )
    parser.add_argument("--json", action="store_true", help="print JSON")
    parser.set_defaults(run=compare)


def compare(options: argparse.Namespace, console: Console) -> int:
    """Print the table, and draw the picture that is asked for."""
    if options.png is not None and options.png.suffix != ".png":
        raise ConfigError(f"--png {options.png}: must end in .png")
    axis = Axis(options.x)
    runs = load_runs(options.runs, axis)
    if options.png is not None:
        draw(runs, options.png, axis)
    losses, figures = losses_at_steps(runs), figures_at_the_end(runs)
    if options.json:
        print(json.dumps(as_json(runs, losses, figures), allow_nan=False))
        return 0
    names = [run.name for run in runs]
    for title, compared in (("losses at common steps", losses), ("latest common figures", figures)):
        rows = [dict(cells(each, names)) for each in compared]
        if rows:
            console.print(fitting_table(title, rows, console.width, left=("figure",), wraps=("figure",)))
    if len(runs) > 1 and not losses:
        console.print("The runs have no step with a loss in common.")
    if options.png is not None:
        console.print(f"drawn: {options.png}", markup=False)
    return 0


def draw(runs: Sequence[ComparedRun], path: Path, axis: Axis) -> None:
    """Draw the picture. Raises `MachineError` where it cannot be written."""
    from k25_train.metrics.compare.picture import plot_runs  # slow to import

    try:
        plot_runs(runs, path, axis)
    except OSError as error:
        raise MachineError(f"--png {path}: cannot be written: {error.strerror or error}") from error


def as_json(
    runs: Sequence[ComparedRun], losses: Sequence[Compared], figures: Sequence[Compared]
) -> dict[str, Any]:
    """Plain values."""

    def plain(each: Compared) -> dict[str, Any]:
        return {"figure": each.figure, "step": each.step, "values": each.values}

    return {
        "format_version": FORMAT_VERSION,
        "runs": [{"name": run.name, "where": run.where, "start": run.start} for run in runs],
        "losses": [plain(each) for each in losses],
        "figures": [plain(each) for each in figures],
    }
