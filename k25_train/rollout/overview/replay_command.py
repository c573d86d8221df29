"""`k25-rollout replay`: derives all from the journal once more, and compares it with the step files."""

import argparse
from pathlib import Path
from typing import Any

from rich.console import Console

from k25_train.rollout.overview.groups import UNDER_WAY, ShownGroup, groups_of_run
from k25_train.rollout.overview.replay import replay
from k25_train.rollout.overview.stats_command import records_of

MOST_SHOWN = 100
"""Differences that are printed."""


def add(commands: Any) -> None:
    """Declare the command."""
    parser = commands.add_parser(
        "replay",
        help="whether the journal and the step files of a run agree",
        description=(__doc__ or "").partition(":")[2].strip() + " Exit status 1 where they do not agree.",
    )
    parser.add_argument("run_folder", metavar="RUN", type=Path, help="folder of a run of k25-rl")
    parser.set_defaults(run=run)


def run(options: argparse.Namespace, console: Console) -> int:
    """Print what differs; returns the exit status."""
    files: dict[int, dict[int, ShownGroup]] = {}
    for group in groups_of_run(options.run_folder):
        if group.step != UNDER_WAY:
            files.setdefault(group.step, {})[group.number] = group
    found = replay(records_of(options.run_folder), files)
    for difference in found.differences[:MOST_SHOWN]:
        console.print(difference, markup=False, highlight=False, soft_wrap=True)
    words = (
        f"{found.records:,} records; {found.responses:,} responses of {found.steps:,} steps compared, "
        f"{found.partial:,} groups only in part in the journal; {len(found.differences):,} differences"
    )
    console.print(words, highlight=False, soft_wrap=True)
    return 1 if found.differences else 0
