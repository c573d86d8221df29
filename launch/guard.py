"""Undoes a submission whose process is gone, SIGKILL included: no job, no lock and no file is left of it.

    python -m launch.guard RUN_FOLDER TOKEN [CREATED_FOLDER ...]

Reads from stdin what the submission has done so far (`sbatch`, `job N`, `done`). The end of that pipe without
`done` means that the submission is over: sbatch, if it was called, has inherited the pipe and ended, too.
"""

import contextlib
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from types import TracebackType
from typing import Self

from k25_train.entry import run_command
from k25_train.run_folder import jobs, lock
from k25_train.run_folder.held import hold
from k25_train.run_folder.record import LockedError
from launch import scheduler, staging, started_by

PATIENCE_S = 600.0
"""How long SLURM's controller may be unreachable while a job is to be cancelled."""
LATE_S = 10.0
"""How long a job may take to appear after sbatch has ended."""
POLL_S = 1.0
SBATCH, DONE = "sbatch", "done"
"""What the guard is told, in addition to `job N`."""
CHECKOUT = Path(__file__).resolve().parents[1]


class Guard:
    """The process that undoes a submission if this one is killed; ends with the context."""

    def __init__(self, run: Path, token: str, created: Sequence[str]) -> None:
        """Start it.

        Args:
            run: the run folder.
            token: the submission's.
            created: folders that the submission creates, innermost first.
        """
        self._process = subprocess.Popen(
            [sys.executable, "-m", "launch.guard", str(run), token, *created],
            cwd=CHECKOUT,
            stdin=subprocess.PIPE,
            stdout=subprocess.DEVNULL,
            encoding="utf-8",
            start_new_session=True,
        )
        assert self._process.stdin is not None
        self._pipe = self._process.stdin
        self.fd = self._pipe.fileno()
        """What sbatch inherits."""
        self._is_done = False

    def tell(self, text: str) -> None:
        """Say how far the submission has come."""
        self._is_done = text == DONE
        with contextlib.suppress(OSError):  # It was killed; the job finds out by itself.
            self._pipe.write(f"{text}\n")
            self._pipe.flush()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        with contextlib.suppress(OSError):
            self._pipe.close()
        # What could not be undone here, it does in its own time.
        if self._is_done:
            self._process.wait()


def undo(
    run: Path,
    token: str,
    created: Sequence[str],
    release: Callable[[], None],
    *,
    may_have_job: bool,
    patience_s: float,
) -> None:
    """Cancel a submission's job and remove what it wrote.

    Args:
        run: the run folder.
        token: the submission's.
        created: folders that it created, innermost first; those that are empty go.
        release: releases the folder.
        may_have_job: whether sbatch was called, and did not refuse.
        patience_s: how long SLURM's controller may be unreachable meanwhile.
    """
    if may_have_job:
        for job_id in cancel_jobs(token, patience_s):
            lock.release(run, job_id)
    staging.discard(staging.folder_of(run, token))
    with contextlib.suppress(OSError, LockedError):
        release()
    for folder in created:
        with contextlib.suppress(OSError):
            os.rmdir(folder)


def cancel_jobs(token: str, patience_s: float) -> list[int]:
    """Cancel every job with the token, also one that appears within `LATE_S`; returns them."""
    deadline = time.monotonic() + LATE_S
    while True:
        found = scheduler.jobs_submitted_as(token, patience_s)
        for job_id in found:
            scheduler.cancel(job_id, patience_s)
        if found or time.monotonic() >= deadline:
            return found
        time.sleep(POLL_S)


def release_dead(run: Path, token: str) -> None:
    """Release a folder whose submission has ended. Raises `LockedError` or OSError if that cannot be done."""
    holder = lock.current(run)
    if holder is not None and holder.id == token:
        hold(run, None, lambda job: jobs.job_state(job, PATIENCE_S)).close()


def is_handed_over(run: Path, job_id: int | None) -> bool:
    """Whether the folder belongs to the submission's job."""
    try:
        holder = lock.current(run)
    except (OSError, LockedError):
        return False
    return job_id is not None and holder is not None and holder.job_id == job_id


def main() -> None:
    """Wait for the end of a submission."""
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, signal.SIG_IGN)
    run_command(_run)


def _run() -> None:
    folder, token, *created = started_by.arguments("RUN_FOLDER TOKEN ...")
    run, told = Path(folder), sys.stdin.read().splitlines()
    if DONE in told:
        return
    job_ids = [int(line.removeprefix("job ")) for line in told if line.startswith("job ")]
    if is_handed_over(run, job_ids[-1] if job_ids else None):
        staging.commit(run, token)
        print(f"launch.slurm was killed; job {job_ids[-1]} is submitted", file=sys.stderr, flush=True)
        return
    undo(
        run,
        token,
        created,
        lambda: release_dead(run, token),
        may_have_job=SBATCH in told,
        patience_s=PATIENCE_S,
    )
    print(f"launch.slurm was killed; nothing is left of its submission to {run}", file=sys.stderr, flush=True)


if __name__ == "__main__":
    main()
