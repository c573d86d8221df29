"""What a search of layouts found, for a terminal and as JSON."""

import sys
import time
from typing import Any

from rich.console import Console
from rich.table import Table

from k25_train.plan.search.ranking import COLUMNS, Ranking
from k25_train.plan.search.reasons import summed_up
from k25_train.terminal import table_width

EVERY_S = 1.0
"""Seconds between lines about progress."""


def print_ranking(ranking: Ranking) -> None:
    """Print whether it was given up, the best layouts, why others lose, and the winner's overrides."""
    console = Console(width=table_width(), highlight=False)
    if ranking.gave_up:
        console.print(ranking.gave_up, soft_wrap=True)
    table = Table(*COLUMNS)
    for row in ranking.rows:
        table.add_row(*row)
    console.print(table)
    for name, reason in ranking.losers[: ranking.num_near]:
        console.print(f"{name}: {reason}", soft_wrap=True)
    for line in summed_up(reason for _, reason in ranking.losers[ranking.num_near :]):
        console.print(line, soft_wrap=True)
    for note in ranking.notes:
        console.print(note, soft_wrap=True)
    if ranking.overrides:
        console.print(f"to paste: {' '.join(ranking.overrides)}", soft_wrap=True, markup=False)


def ranking_as_dict(ranking: Ranking) -> dict[str, Any]:
    """The same as plain values."""
    return {
        "is_complete": not ranking.gave_up,
        "overrides": ranking.overrides,
        "ranked": [dict(zip(COLUMNS, row, strict=True)) for row in ranking.rows],
        "losers": dict(ranking.losers),
        "notes": ranking.notes,
    }


class Progress:
    """Says on stderr how far a search is, once it takes longer than a second."""

    def __init__(self) -> None:
        self._next_s = time.monotonic() + EVERY_S

    def __call__(self, num_planned: int, num_open: int, best_s: float) -> None:
        """Called after each answer."""
        if time.monotonic() < self._next_s:
            return
        self._next_s = time.monotonic() + EVERY_S
        best = f", best step {best_s:.2f} s" if best_s < float("inf") else ""
        print(f"{num_planned:,} planned, {num_open:,} open{best}", file=sys.stderr, flush=True)
