"""What SLURM says of a job, through its command-line tools."""

import os
import subprocess
import time

from k25_train.errors import K25Error

ANSWER_S = 60.0
"""Time limit of a SLURM command; the commands wait for a controller that is down."""
RETRY_S = 10.0
"""Pause before a command is retried."""
TRANSIENT_ERRORS = (
    "Unable to contact slurm controller", "timed out", "no answer", "Zero Bytes were transmitted",
    "Communication connection failure", "transitional state",
)  # fmt: skip
"""Parts of error messages that go away by themselves."""
ENDED = {
    "BOOT_FAIL", "CANCELLED", "COMPLETED", "DEADLINE", "FAILED", "NODE_FAIL", "OUT_OF_MEMORY", "PREEMPTED",
    "REVOKED", "TIMEOUT",
}  # fmt: skip
"""States of a job that does not come back."""


class SchedulerError(K25Error):
    """SLURM refuses, cannot be reached, or is not installed."""


def ask(*command: str, patience_s: float = 0.0) -> str:
    """Run a SLURM command and return what it prints.

    Args:
        command: the program and its arguments; no shell is involved.
        patience_s: how long to retry while the controller does not answer.

    Raises:
        SchedulerError: the command is not installed, or fails; with its own message.
    """
    deadline = time.monotonic() + patience_s
    while True:
        try:
            done = subprocess.run(
                command,
                env=environment(),
                capture_output=True,
                encoding="utf-8",
                errors="replace",
                timeout=ANSWER_S,
                check=False,
            )
        except FileNotFoundError as error:
            raise SchedulerError(
                f"{command[0]} is not on PATH: submit from a node of the cluster, or view the script with "
                "--dry-run"
            ) from error
        except subprocess.TimeoutExpired:
            trouble = f"no answer within {ANSWER_S:g} s"
        else:
            if done.returncode == 0:
                return done.stdout
            trouble = (done.stderr or done.stdout).strip()
        if time.monotonic() >= deadline or not any(words in trouble for words in TRANSIENT_ERRORS):
            raise SchedulerError(f"{' '.join(command)}: {trouble}")
        time.sleep(RETRY_S)


def environment() -> dict[str, str]:
    """This process's environment without the variables by which users filter sinfo and squeue."""
    filters = ("SINFO_", "SQUEUE_")
    return {name: value for name, value in os.environ.items() if not name.startswith(filters)}


def job_state(job_id: int, patience_s: float = 0.0) -> str | None:
    """State of a job, such as RUNNING; None if SLURM no longer knows the job."""
    states = query_job(job_id, "%T", patience_s).split()
    return states[0] if states else None


def query_job(job_id: int, line_format: str, patience_s: float) -> str:
    """squeue's line on a job in the given format; empty if SLURM no longer knows the job."""
    command = ["squeue", "--noheader", f"--jobs={job_id}", "--states=all", f"--format={line_format}"]
    try:
        return ask(*command, patience_s=patience_s)
    except SchedulerError as error:
        if "Invalid job id" in str(error):
            return ""
        raise
