"""`k25-rollout stats`: responses by state, turns, tokens, seconds, failures by cause, from the journal."""

import argparse
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from rich.console import Console

from k25_train.errors import RolloutError
from k25_train.rollout.journal import journal_files
from k25_train.rollout.journal_state import JournalState
from k25_train.rollout.overview.groups import JOURNAL, ROLLOUTS
from k25_train.rollout.overview.tally import tally
from k25_train.rollout.records import Record, records_in
from k25_train.tables import fitting_table


def add(commands: Any) -> None:
    """Declare the command."""
    parser = commands.add_parser(
        "stats",
        help="a run's rollouts in numbers",
        description=(__doc__ or "").partition(":")[2].strip(),
    )
    parser.add_argument("run_folder", metavar="RUN", type=Path, help="folder of a run of k25-rl")
    parser.set_defaults(run=run)


def run(options: argparse.Namespace, console: Console) -> int:
    """Print the tables; returns the exit status."""
    found = tally(records_of(options.run_folder), JournalState())
    shown = {f"{phase} seconds": f"{seconds:,.1f}" for phase, seconds in found.seconds.items()}
    tables: dict[str, Mapping[str, Any]] = {
        "responses by state": found.states,
        "ended by": found.endings,
        "numbers": {**found.numbers, **shown},
        "failures by cause": found.failures,
    }
    for title, counts in tables.items():
        rows = [
            {title: name, "number": value if isinstance(value, str) else f"{value:,}"}
            for name, value in counts.items()
            if value
        ]
        if rows:
            console.print(fitting_table("", rows, console.width, left=(title,), least=()))
    return 0


def records_of(run_folder: Path) -> Iterator[Record]:
    """All records of a run's journal, as far as they are whole. Raises `RolloutError` where there is none."""
    files = journal_files(run_folder / ROLLOUTS / JOURNAL)
    if not files:
        raise RolloutError(f"{run_folder}: has no journal: name the run.dir of `python -m k25_train.rl`")
    for path in files:
        for record, _ in records_in(path.read_bytes()):
            yield record
