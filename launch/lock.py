"""One job a run folder: two would write the same metrics and delete each other's checkpoints.

The lock is a file with the job's id, made by a hard link, which is atomic on NFS and Lustre alike, while
flock is local to a node on many of their mounts. It outlives a requeue, for the job comes back; whether one
that was left behind still counts, SLURM knows best.
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


class LockedError(K25Error):
    """The run folder belongs to another job."""


def holder(run: Path) -> int | None:
    """The job that has the folder, or had it last. Raises `LockedError` if the file is damaged."""
    try:
        return int(json.loads((run / LOCK).read_text())["job_id"])
    except FileNotFoundError:
        return None
    except (ValueError, KeyError, TypeError) as error:
        raise LockedError(
            f"{run / LOCK}: is damaged ({error}): if no job is queued or runs on this folder, delete it"
        ) from error


def check_free(run: Path, job_state: JobState) -> None:
    """Raise `LockedError` if a job that is queued or runs has the folder."""
    job = holder(run)
    state = None if job is None else job_state(job)
    if job is not None and state is not None and state not in ENDED:
        raise LockedError(
            f"run.dir={run} belongs to job {job}, which is {state}: follow that one, end it with "
            f"`scancel {job}`, or choose another run.dir"
        )


def acquire(run: Path, job_id: int, job_state: JobState) -> None:
    """Take the folder for a job, which may have it already.

    Raises:
        LockedError: another job that is queued or runs has it, or takes it at this moment.
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
    """Put one's own lock in the place of one that a job left behind.

    Of several that try, the one that makes the claim goes on; it looks again, as it may come late.

    Raises `LockedError` if another job has the claim.
    """
    claim = run / f"{LOCK}.claim"
    if not link(mine, claim):
        raise LockedError(
            f"{run / LOCK} of job {dead}, which has ended, is being replaced by another job. If none is "
            f"queued or runs on this folder, delete {claim} and submit again"
        )
    try:
        if holder(run) == dead:
            os.replace(claim, run / LOCK)
    finally:
        claim.unlink(missing_ok=True)


def release(run: Path, job_id: int) -> None:
    """Give the folder back, if it is this job's."""
    if holder(run) == job_id:
        with contextlib.suppress(FileNotFoundError):
            (run / LOCK).unlink()


def link(source: Path, target: Path) -> bool:
    """Whether `target` was free, and is `source` now."""
    try:
        os.link(source, target)
    except FileExistsError:
        return False
    return True
