"""Logs that explain nothing any more: a run of months has hundreds of attempts of thousands of ranks."""

import contextlib
from collections.abc import Sequence
from pathlib import Path

from launch.history import Attempt, Outcome

KEPT = 10
"""Newest attempts of which everything stays."""


def remove_old_logs(root: Path, history: Sequence[Attempt]) -> None:
    """Remove the ranks' logs of attempts that were stopped as asked and have `KEPT` newer ones.

    Records, logs of nodes and of srun, and everything of attempts that ended in any other way stay. What
    cannot be removed stays too.

    Args:
        root: the folder `attempts/`.
        history: all attempts of the run, oldest first.
    """
    for attempt in history[:-KEPT]:
        if attempt.outcome == Outcome.stopped:
            with contextlib.suppress(OSError):
                for log in (root / str(attempt.number)).glob("rank_*.log*"):
                    log.unlink(missing_ok=True)
