"""Room for the next checkpoint in the run folder: before ranks compute towards it, and after they failed."""

import dataclasses
from collections.abc import Callable, Iterator
from pathlib import Path

from launch.attempts import Attempts
from launch.history import Attempt, Outcome
from launch.patience import LIMIT_S, Patience, check_room, describe, found_no_room
from launch.submission import Submission

LOG_END_BYTES = 64 << 10
"""What is read of each rank's log to find why it failed."""


class RunFolderRoom:
    """The run folder of a job, with the room that its checkpoints need."""

    def __init__(
        self, submission: Submission, is_stopped: Callable[[], bool], tell: Callable[[str], None]
    ) -> None:
        """`is_stopped` and `tell` as those of `Patience`."""
        self.submission = submission
        self.run = Path(submission.run)
        self.patience = Patience(self.run, LIMIT_S, is_stopped, tell)

    def step_now(self) -> str:
        """How far the metrics say that ranks have come, without waiting for them; empty if unknown."""
        try:
            last = Attempts(self.run).progress().last
        except OSError:
            return ""
        return "" if last is None else f"step {last:,} of {self.submission.num_steps:,}"

    def wait(self) -> None:
        """Return once a checkpoint has room. Raises `UnwritableError` if it never has."""
        self.patience.of(lambda: check_room(self.run, self.missing_bytes()))

    def missing_bytes(self) -> int:
        """Bytes that must be free: one checkpoint; where preflight runs, as many as it wants room for."""
        one_bytes, wanted = self.submission.checkpoint_bytes, self.submission.max_checkpoints
        if not self.submission.preflight:
            return one_bytes
        return max(one_bytes, wanted * one_bytes - bytes_in(self.run / "checkpoints"))

    def judged(self, ended: Attempt, attempts: Attempts) -> Attempt:
        """The record of an attempt that failed, with another outcome and reason if it did for want of room.

        No node is to blame for that.
        """
        if ended.outcome != Outcome.failed:
            return ended
        try:
            check_room(self.run, self.submission.checkpoint_bytes)
            found = (found_no_room(end, self.run) for end in log_ends(attempts.folder(ended)))
            trouble = next(filter(None, found), "")
        except OSError as error:
            trouble = describe(error, self.run)
        if not trouble:
            return ended
        return dataclasses.replace(ended, outcome=Outcome.no_room, reason=trouble)


def bytes_in(folder: Path) -> int:
    """Bytes of all files below a folder, as far as they can be seen."""
    found = 0
    for path in folder.rglob("*"):
        try:
            found += path.lstat().st_size if path.is_file() else 0
        except OSError:
            continue
    return found


def log_ends(folder: Path) -> Iterator[str]:
    """The end of each rank's log of an attempt: one at a time, since there may be thousands."""
    for path in sorted(folder.glob("rank_*.log")):
        try:
            with path.open("rb") as file:
                file.seek(max(0, path.stat().st_size - LOG_END_BYTES))
                yield file.read().decode(errors="replace")
        except OSError:
            continue
