"""What the supervisor does at the moment, in the job's comment: `squeue --format='%i %j %T %k'` shows it.

    [cluster.slurm.comment | ]k25: training, step 1,240 of 10,000

A thread of its own asks SLURM, so that a controller that is slow or away holds up nothing. Its errors are
passed over: a site may not let users change comments.
"""

import contextlib
import threading
from collections.abc import Callable

from k25_train.run_folder.jobs import SchedulerError, ask

EVERY_S = 60.0
"""Seconds between updates of the step; each is a request to SLURM's controller."""
SHORTEST_S = 5.0
"""Seconds between updates, also if states change faster."""
CLOSE_S = 10.0
"""Longest time that the last update may take."""
MAX_LENGTH = 200
"""Characters of our part of a comment."""
MARK = "k25: "


class JobComment:
    """Keeps the comment of a job up to date until it is closed."""

    def __init__(self, job_id: int, prefix: str | None, progress: Callable[[], str]) -> None:
        """Start with no state.

        Args:
            job_id: the job.
            prefix: the site's own comment, which stays in front; None for none.
            progress: how far ranks are, such as "step 7 of 20"; asked while they train, from another thread.
        """
        self.job_id = job_id
        self.prefix = f"{prefix} | {MARK}" if prefix else MARK
        self._progress = progress
        self._state, self._with_progress = "", False
        self._shown = ""
        self._changed, self._is_over = threading.Event(), threading.Event()
        self._thread = threading.Thread(target=self._keep, name="job comment", daemon=True)
        self._thread.start()

    def say(self, state: str, *, with_progress: bool = False) -> None:
        """Show a state from now on; returns at once.

        Args:
            state: a few words.
            with_progress: whether the step, which changes, follows.
        """
        self._state, self._with_progress = state, with_progress
        self._changed.set()

    def close(self) -> None:
        """Show the latest state, within `CLOSE_S`, and stop. May be called again."""
        self._is_over.set()
        self._changed.set()
        self._thread.join(CLOSE_S)

    def _keep(self) -> None:
        while True:
            self._changed.wait(EVERY_S)
            self._changed.clear()
            is_over = self._is_over.is_set()
            self._show()
            if is_over:
                return
            self._is_over.wait(SHORTEST_S)

    def _show(self) -> None:
        text = self.text()
        if not self._state or text == self._shown:
            return
        with contextlib.suppress(SchedulerError, OSError):
            ask("scontrol", "update", f"JobId={self.job_id}", f"Comment={self.prefix}{text}")
            self._shown = text

    def text(self) -> str:
        """Our part of the comment, without its mark."""
        words = [self._state]
        if self._with_progress:
            words.append(self._progress())
        return plain(", ".join(filter(None, words)))


def plain(text: str) -> str:
    """A text on one line, without signs that squeue, scripts or SLURM could misread."""
    clean = "".join(" " if sign in "\"'`\\|=;" or not sign.isprintable() else sign for sign in text)
    short = " ".join(clean.split())
    return short if len(short) <= MAX_LENGTH else short[: MAX_LENGTH - 3] + "..."
