"""One job per run folder: two would write the same metrics and delete each other's checkpoints.

The lock is a file with the job's id. It is created by a hard link, which is atomic on both NFS and Lustre,
whereas flock is node-local on many of their mounts. It outlives a requeue, since the job comes back. Whether
a lock that was left behind still counts is decided by asking SLURM.
"""

import contextlib
import json
import os
from collections.abc import Callable
from pathlib import Path

from k25_train.errors import K25Error

LOCK = "lock.json"
ENDED = {
    "BOOT_FAIL", "CANCELLED", "COMPLETED", "DEADLINE", "FAILED", "NODE_FAIL", "OUT_OF_MEMORY", "PREEMPTED",
    "REVOKED", "TIMEOUT",
}  # fmt: skip
"""States of a job that does not come back."""
JobState = Callable[[int], str | None]
"""Job id -> the job's state, None if SLURM no longer knows the job."""


class LockedError(K25Error):
    """The run folder belongs to another job."""


def holder(run: Path) -> int | None:
    """The job that holds the folder, or held it last. Raises `LockedError` if the file is damaged."""
    try:
        return int(json.loads((run / LOCK).read_text())["job_id"])
    except FileNotFoundError:
        return None
    except (ValueError, KeyError, TypeError) as error:
        raise LockedError(
            f"{run / LOCK}: is damaged ({error}): if no job on this folder is queued or running, delete it"
        ) from error


def check_free(run: Path, job_state: JobState) -> None:
    """Raise `LockedError` if a queued or running job holds the folder."""
    job = holder(run)
    state = None if job is None else job_state(job)
    if job is not None and state is not None and state not in ENDED:
        raise LockedError(
            f"run.dir={run} belongs to job {job}, which is {state}: follow that job, end it with "
            f"`scancel {job}`, or choose another run.dir"
        )


def acquire(run: Path, job_id: int, job_state: JobState) -> None:
    """Take the folder for a job, which may hold it already.

    Raises:
        LockedError: another queued or running job holds it, or is taking it at this moment.
    """
    mine = run / f"{LOCK}.{job_id}"
    mine.write_text(json.dumps({"job_id": job_id}) + "\n")
    try:
        while not link(mine, run / LOCK):
            dead = holder(run)
            if dead == job_id:
                return
            check_free(run, job_state)
            replace(run, dead, mine)
    finally:
        mine.unlink(missing_ok=True)


def replace(run: Path, dead: int | None, mine: Path) -> None:
    """Replace the lock that job `dead` left behind by `mine`.

    Of several jobs that try, the one that creates the claim file wins; it checks the holder again, since
    another may have finished replacing the lock just before.

    Raises `LockedError` if another job holds the claim.
    """
    claim = run / f"{LOCK}.claim"
    if not link(mine, claim):
        raise LockedError(
            f"{run / LOCK} of job {dead}, which has ended, is being replaced by another job. If none on "
            f"this folder is queued or running, delete {claim} and submit again"
        )
    try:
        if holder(run) == dead:
            os.replace(claim, run / LOCK)
    finally:
        claim.unlink(missing_ok=True)


def release(run: Path, job_id: int) -> None:
    """Release the folder if this job holds it."""
    if holder(run) == job_id:
        with contextlib.suppress(FileNotFoundError):
            (run / LOCK).unlink()


def link(source: Path, target: Path) -> bool:
    """Link `target` to `source` and return True; False if `target` exists."""
    try:
        os.link(source, target)
    except FileExistsError:
        return False
    return True
