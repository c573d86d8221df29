"""`k25-rollout list`: a table of the groups of a run, by the step that trains on them."""

import argparse
from pathlib import Path
from typing import Any

from rich.console import Console

from k25_train.rollout.overview.groups import UNDER_WAY, ShownGroup, groups_of_run
from k25_train.tables import fitting_table

LEFT = ("task", "step", "ended")


def add(commands: Any) -> None:
    """Declare the command."""
    parser = commands.add_parser(
        "list",
        help="table of a run's groups",
        description=(__doc__ or "").partition(":")[2].strip(),
    )
    parser.add_argument("run_folder", metavar="RUN", type=Path, help="folder of a run of k25-rl")
    parser.add_argument("--last", type=int, default=50, metavar="N", help="latest groups (%(default)s)")
    parser.set_defaults(run=run)


def run(options: argparse.Namespace, console: Console) -> int:
    """Print the table; returns the exit status."""
    groups = list(groups_of_run(options.run_folder))
    rows = [_row(group) for group in groups[-options.last :]]
    words = f"{options.run_folder}: {len(groups):,} groups, the latest {len(rows):,}"
    console.print(fitting_table(words, rows, console.width, left=LEFT, least=("versions", "spread")))
    return 0


def _row(group: ShownGroup) -> dict[str, str]:
    rewards, tokens = group.rewards, group.num_tokens
    versions = sorted({int(each) for response in group.responses for each in response.versions})
    reasons = [response.facts["finish_reason"] or "no token yet" for response in group.responses]
    return {
        "group": f"{group.number:,}",
        "task": group.task,
        "step": "in progress" if group.step == UNDER_WAY else f"{group.step:,}",
        "responses": str(len(tokens)),
        "reward": f"{sum(rewards) / len(rewards):.3f}" if rewards else "",
        "spread": f"{min(rewards):.3g} to {max(rewards):.3g}" if rewards else "",
        "tokens": f"{sum(tokens) / max(len(tokens), 1):.1f}",
        "versions": f"{versions[0]} to {versions[-1]}" if versions else "",
        "ended": ", ".join(f"{reasons.count(each)} {each}" for each in sorted(set(reasons))),
    }
