"""Waits until SLURM creates steps again: srun that finds no controller says so and ends, before any rank ran.

Without this, a controller that is away while two attempts start would count as two failures of the run.
"""

import re
import time
from collections.abc import Callable
from pathlib import Path

from k25_train.run_folder.jobs import RETRY_S, SchedulerError
from k25_train.run_folder.passing import passes
from launch.output import log
from launch.requeueing import PATIENCE_S
from launch.scheduler import first_to_fail

NOT_CREATED = re.compile(
    r"^srun: (?:error: Unable to (?:create step|confirm allocation) for job .*|fatal: .*|error: Munge .*)$",
    re.MULTILINE,
)
"""srun's last words before it ends without a step: src/srun/libsrun/{launch,allocate}.c, read_config.c and
src/plugins/auth/munge/auth_munge.c."""


def until_created[T](start: Callable[[], T], srun_log: Path, is_over: Callable[[], bool]) -> T:
    """The result of a step, which is started again as long as SLURM cannot create it for the moment.

    Args:
        start: runs the step to its end.
        srun_log: srun's output, to which it appends.
        is_over: whether the job was asked to stop, so that nothing is waited for any more.

    Raises:
        SchedulerError: the step failed in a way that does not pass, or for too long.
    """
    start_s = time.monotonic()
    while True:
        before, error = size_of(srun_log), None
        try:
            result = start()
            if result == 0:
                return result
        except SchedulerError as failed:
            error = failed
        trouble = why_not_created(text_from(srun_log, before))
        waited_s = time.monotonic() - start_s
        if not trouble or is_over() or waited_s >= PATIENCE_S:
            if error is not None:
                raise error
            return result
        log(f"{trouble}: that passes; srun is called again, {waited_s:.0f} of at most {PATIENCE_S:g} s")
        deadline = time.monotonic() + RETRY_S
        while not is_over() and time.monotonic() < deadline:
            time.sleep(min(0.2, RETRY_S))


def why_not_created(printed: str) -> str:
    """The line in which srun says that trouble which passes kept it from creating a step; empty without."""
    if first_to_fail(printed) is not None:
        # It was created, and its tasks have failed.
        return ""
    lines = (match[0] for match in NOT_CREATED.finditer(printed))
    return next((line for line in lines if passes(line)), "")


def size_of(path: Path) -> int:
    """Bytes of a file, 0 if it cannot be seen."""
    try:
        return path.stat().st_size
    except OSError:
        return 0


def text_from(path: Path, start: int) -> str:
    """What was appended to a file, in any encoding; all of it if it is shorter by now, "" if that fails."""
    try:
        content = path.read_bytes()
    except OSError:
        return ""
    return content[start if start <= len(content) else 0 :].decode(errors="replace")
