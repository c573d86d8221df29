"""Whether a job that starts is the run's: it takes the folder, or ends before it starts any rank.

A job of launch.slurm has a token, which is also in the submit.json that it was queued with. One that was
queued by `sbatch RUN/submit.sbatch` has none, and continues whatever was submitted last.
"""

import time
from pathlib import Path

from k25_train.errors import ConfigError
from k25_train.run_folder import jobs, lock, process
from k25_train.run_folder.heartbeat import is_renewed
from k25_train.run_folder.record import LOCK, Holder, LockedError
from launch import staging
from launch.submission import SCRIPT, Submission

POLL_S = 0.5
"""Pause before another look at a folder that is about to be handed over."""


def take_run(run: Path, job_id: int, token: str, patience_s: float) -> Submission:
    """Take the run folder for the job of this process, and read what was submitted.

    Args:
        run: the run folder.
        job_id: the job.
        token: its submission's; empty if it was queued by hand.
        patience_s: how long SLURM's controller may be unreachable meanwhile.

    Raises:
        LockedError: the folder is another's, or the job's submission was not completed or is outdated.
        ConfigError: nothing was submitted, or submit.json is damaged.
        OSError: the folder cannot be read or written.
    """
    holder = wait_for_hand_over(run, token)
    was_handed_over = holder is not None and holder.job_id == job_id
    lock.acquire(run, job_id, lambda job: jobs.job_state(job, patience_s))
    # The folder is this job's now: what was on its way into it is either this job's, or nobody's.
    for folder in staging.staged(run):
        if was_handed_over and folder == staging.folder_of(run, token):
            staging.commit(run, token)
        else:
            staging.discard(folder)
    submission = None
    try:
        submission = Submission.read(run)
    except FileNotFoundError as error:
        raise ConfigError(f"{error.filename}: does not exist: submit the run with launch.slurm") from error
    finally:
        if submission is None or token not in {"", submission.token}:
            lock.release(run, job_id)
    if token not in {"", submission.token}:
        raise LockedError(
            f"run.dir={run}: job {job_id} is not of the run's last submission: another one has replaced its "
            f"own, or that was not completed; nothing was started. To continue the run: sbatch {run / SCRIPT}"
        )
    return submission


def wait_for_hand_over(run: Path, token: str) -> Holder | None:
    """Who holds the folder once the process that submits this job has handed it over, or has given it up.

    Raises `LockedError` if that process died before it could.
    """
    while True:
        holder = lock.current(run)
        if holder is None or not token or holder.id != token or holder.process is None:
            return holder
        what = f"run.dir={run} is being submitted by {holder.describe()}"
        found = process.liveness(holder.process)
        is_dead = found is process.Liveness.dead
        if is_dead or (found is process.Liveness.unknown and not is_renewed(run / LOCK, what, jobs.say)):
            # It may have been handed over while it was watched.
            again = lock.current(run)
            if again is not None and again.id == token:
                raise LockedError(
                    f"run.dir={run}: the submission of this job was interrupted before it was complete "
                    f"({holder.describe()} is gone), so the job does not have the folder; nothing was "
                    "started: submit the run again"
                )
            continue
        time.sleep(POLL_S)
