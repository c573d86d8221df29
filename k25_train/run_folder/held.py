"""The lock of the run folder in the hands of the process that writes there."""

import atexit
import contextlib
import os
import time
from pathlib import Path

from k25_train.errors import K25Error
from k25_train.run_folder.heartbeat import Heartbeat
from k25_train.run_folder.leftovers import remove_leftovers
from k25_train.run_folder.lock import JobState, current, take, written
from k25_train.run_folder.process import this_process
from k25_train.run_folder.record import LOCK, Holder, LockedError, new_holder

NUM_LOOKS, PAUSE_S = 3, 1.0
"""A file system may hide a file for a moment: how often, and after how long, the lock is looked for again."""


class HeldFolder:
    """A run folder that this process holds, until it closes it or ends."""

    def __init__(self, run: Path, holder: Holder) -> None:
        """`holder` is this process's record, which is in the lock."""
        self.run = run
        self.holder = holder
        self._heartbeat: Heartbeat | None = Heartbeat(run / LOCK, self._is_lost)
        # Also if the process ends by an error.
        atexit.register(self.close)

    def check(self) -> None:
        """Raise `LockedError` if the folder, or its lock, is gone or another's: nothing may be written any
        more."""
        trouble = ""
        for look in range(NUM_LOOKS):
            time.sleep(PAUSE_S if look else 0.0)
            try:
                now = current(self.run)
            except (OSError, K25Error) as error:
                trouble = f"{self.run / LOCK} cannot be read ({error})"
                continue
            if now is None:
                where = self.run / LOCK if self.run.is_dir() else self.run
                trouble = f"{where} was deleted or moved while the run was writing there"
                continue
            if now.id == self.holder.id:
                return
            trouble = f"the folder was taken over by {now.describe()}"
            break
        raise LockedError(
            f"run.dir={self.run}: {trouble}. Nothing more is written there: two writers would destroy each "
            "other's checkpoints. See who else uses the folder, then start again: the run goes on from its "
            "newest checkpoint"
        )

    @property
    def is_lost(self) -> bool:
        """Whether the folder was seen to be gone or another's, a moment ago; costs nothing to ask."""
        return self._heartbeat is not None and self._heartbeat.is_lost

    def _is_lost(self) -> bool:
        try:
            self.check()
        except K25Error:
            return True
        return False

    def hand_over(self, job_id: int) -> None:
        """Give the folder to a SLURM job, by one rename.

        Raises `LockedError` if another has taken it; OSError if that cannot be written, and then it stays
        this process's.
        """
        self.check()
        with written(self.run, new_holder(job_id, None)) as scratch:
            os.replace(scratch, self.run / LOCK)
        self._stop()

    def _stop(self) -> None:
        atexit.unregister(self.close)
        if self._heartbeat is not None:
            self._heartbeat.close()
            self._heartbeat = None

    def close(self) -> None:
        """Release the folder; it stays with the SLURM job that it belongs to, if any. Does nothing if another
        has it by now, or when called again."""
        if self._heartbeat is None or self.holder.process != this_process():
            return
        self._stop()
        with contextlib.suppress(OSError, K25Error):
            now = current(self.run)
            if now is None or now.id != self.holder.id:
                return
            if self.holder.job_id is None:
                (self.run / LOCK).unlink()
                return
            with written(self.run, new_holder(self.holder.job_id, None)) as scratch:
                os.replace(scratch, self.run / LOCK)


def hold(run: Path, within_job: int | None, job_state: JobState, mine: Holder | None = None) -> HeldFolder:
    """Take an existing folder for this process.

    Args:
        run: the folder.
        within_job: SLURM job of this process, which may have the folder already.
        job_state: asks SLURM.
        mine: this process's record, if its id has to be known beforehand.

    Raises as `lock.take` does.
    """
    before = current(run)
    belongs_to_job = before is not None and before.job_id is not None and before.job_id == within_job
    mine = mine or new_holder(within_job if belongs_to_job else None, this_process())
    take(run, mine, within_job, job_state)
    remove_leftovers(run)
    return HeldFolder(run, mine)
