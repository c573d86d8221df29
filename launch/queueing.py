"""Queues a run: all of it, or nothing.

    lock        this process takes the run folder; another submission, job or process is refused from here on
    stage       the new configuration and script are written next to the earlier ones
    sbatch      SLURM queues the staged script, whose path has a token that only this submission has
    hand over   one rename makes the lock the job's: until then all is undone, from then on all is completed
    commit      the staged files replace the earlier ones

Whatever ends it before the lock is handed over, the job is cancelled and the folder is as it was: an error
or a signal here, SIGKILL in `guard`. If both processes are lost, a job that nobody handed the folder to finds
that out when it starts, and ends (`ownership`). A job may start before the hand-over, and waits for it: it is
not held, since a job that is held would stay in the queue forever if nobody releases it.
"""

import contextlib
import dataclasses
import re
import signal
import subprocess
import threading
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from types import FrameType

from k25_train.run_folder import jobs
from k25_train.run_folder.held import HeldFolder, hold
from k25_train.run_folder.jobs import SchedulerError
from k25_train.run_folder.lock import current
from k25_train.run_folder.passing import passes
from k25_train.run_folder.process import this_process
from k25_train.run_folder.record import Holder, new_holder
from launch import scheduler, staging
from launch.guard import DONE, SBATCH, Guard, undo
from launch.submission import Submission

PATIENCE_S = 120.0
"""How long SLURM's controller may be unreachable while somebody waits for the submission."""
SBATCH_S = 300.0
"""Time limit of sbatch, which itself waits two minutes while the queue is full."""
UNDO_S = 30.0
"""The same while a submission is undone; the guard waits longer."""
NUM_TRIES = 5
"""Times that the folder is created, which another submission that fails may remove meanwhile."""


def queue(submission: Submission, config: str, script: str) -> tuple[int, str]:
    """Queue a run whose folder is free; returns the job's id, and when SLURM expects to start it.

    Args:
        submission: the contents of submit.json; gets its token here.
        config: the contents of submit.yaml.
        script: the batch script.

    Raises:
        LockedError: another job or process holds the run folder, or takes it at this moment.
        SchedulerError: SLURM refuses the job, or cannot be reached.
        OSError: the folder cannot be written.
        KeyboardInterrupt: the submission was interrupted.
    """
    run, mine = Path(submission.run), new_holder(None, this_process())
    created = [str(path) for path in (run, *run.parents) if not path.exists()]
    with signals_interrupt(), Guard(run, mine.id, created) as guard:
        sbatch = Sbatch(guard)
        try:
            held = take(run, mine)
            for leftover in staging.staged(run):
                staging.discard(leftover)
            staged = staging.stage(run, dataclasses.replace(submission, token=mine.id), config, script)
            starts = scheduler.estimate_start(staged)
            held.check()
            job_id = sbatch.submit(staged, mine.id)
            guard.tell(f"job {job_id}")
            held.hand_over(job_id)
        except BaseException:
            # An error in here would hide what ended the submission; the guard does the rest.
            with contextlib.suppress(Exception):
                undo(
                    run,
                    mine.id,
                    created,
                    lambda: release(run, mine),
                    may_have_job=sbatch.may_be_queued,
                    patience_s=UNDO_S,
                )
                guard.tell(DONE)
            raise
        staging.commit(run, mine.id)
        guard.tell(DONE)
        sbatch.cancel_others(mine.id, job_id)
    return job_id, starts


def release(run: Path, mine: Holder) -> None:
    """Release the folder if this process has it. Raises `LockedError` or OSError if that cannot be seen."""
    holder = current(run)
    if holder is not None and holder.id == mine.id:
        HeldFolder(run, mine).close()


def take(run: Path, mine: Holder) -> HeldFolder:
    """The run folder, created if need be, in this process's hands. Raises as `held.hold` does."""
    for number in range(NUM_TRIES):
        run.mkdir(parents=True, exist_ok=True)
        try:
            return hold(run, None, lambda job: jobs.job_state(job, PATIENCE_S), mine)
        except FileNotFoundError:
            if number == NUM_TRIES - 1:
                raise
    raise AssertionError("unreachable")


class Sbatch:
    """The call of sbatch, whose answer may be lost although the job was queued."""

    def __init__(self, guard: Guard) -> None:
        """`guard` learns that sbatch is called, and waits for its end."""
        self.guard = guard
        self.may_be_queued = False
        """Whether there may be a job."""
        self.num_calls = 0

    def submit(self, script: Path, token: str) -> int:
        """Queue the script and return the job's id. Raises `SchedulerError` with sbatch's message."""
        deadline = time.monotonic() + PATIENCE_S
        while True:
            self.may_be_queued = True
            status, printed, trouble = self.call(script, token)
            match = re.search(r"^(\d+)(;\S+)?\s*$", printed, re.MULTILINE)
            if status == 0 and match is not None:
                return int(match[1])
            # A refusal is one; after anything else, the job may be in the queue all the same.
            if status and not passes(trouble):
                self.may_be_queued = False
                raise SchedulerError(f"sbatch {script}: {trouble}")
            found = scheduler.jobs_submitted_as(token, PATIENCE_S)
            if found:
                return found[0]
            if time.monotonic() >= deadline or status == 0:
                raise SchedulerError(f"sbatch {script}: {trouble or printed.strip()}")
            jobs.say(f"sbatch: {trouble}: that passes; asking again for at most {PATIENCE_S:g} s")
            time.sleep(jobs.RETRY_S)

    def call(self, script: Path, token: str) -> tuple[int, str, str]:
        """Status and output of sbatch. It has a session of its own: Ctrl-C must not cost its answer."""
        self.num_calls += 1
        self.guard.tell(SBATCH)
        try:
            process = subprocess.Popen(
                ["sbatch", "--parsable", str(script), token],
                env=jobs.environment(),
                stdin=subprocess.DEVNULL,
                stdout=subprocess.PIPE,
                stderr=subprocess.PIPE,
                encoding="utf-8",
                errors="replace",
                start_new_session=True,
                pass_fds=(self.guard.fd,),
            )
        except FileNotFoundError as error:
            self.may_be_queued = False
            raise SchedulerError("sbatch is not on PATH: submit from a node of the cluster") from error
        with process:
            try:
                printed, errors = process.communicate(timeout=SBATCH_S)
            except subprocess.TimeoutExpired:
                process.kill()
                return 1, "", f"the answer timed out after {SBATCH_S:g} s"
        return process.returncode, printed, errors.strip() or printed.strip()

    def cancel_others(self, token: str, job_id: int) -> None:
        """Cancel what an earlier call, whose answer was lost, has queued meanwhile."""
        if self.num_calls == 1:
            return
        for other in scheduler.jobs_submitted_as(token, PATIENCE_S):
            if other != job_id:
                scheduler.cancel(other, PATIENCE_S)


@contextlib.contextmanager
def signals_interrupt() -> Iterator[None]:
    """SIGTERM and SIGHUP end the submission as Ctrl-C does, unless they are ignored or handled."""
    before: Sequence[signal.Signals] = ()
    if threading.current_thread() is threading.main_thread():
        ending = (signal.SIGTERM, signal.SIGHUP)
        before = [number for number in ending if signal.getsignal(number) is signal.SIG_DFL]
    for number in before:
        signal.signal(number, _interrupt)
    try:
        yield
    finally:
        for number in before:
            signal.signal(number, signal.SIG_DFL)


def _interrupt(_number: int, _frame: FrameType | None) -> None:
    raise KeyboardInterrupt
