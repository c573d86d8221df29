"""What SLURM says of a job, through its command-line tools."""

import os
import subprocess
import time
from collections.abc import Sequence

from k25_train.errors import K25Error
from k25_train.run_folder.passing import passes

ANSWER_S = 60.0
"""Time limit of a SLURM command; the commands wait for a controller that is down."""
RETRY_S = 10.0
"""Pause before a command is retried."""
SILENT = "ended without a word, with status"
"""Of a command that was killed, or could not print."""
SILENT_S = 60.0
"""Longest time that a command without a word is called again: it may be broken."""
TELL_S = 60.0
"""Seconds between lines that tell what is waited for."""
ENDED = {
    "BOOT_FAIL", "CANCELLED", "COMPLETED", "DEADLINE", "FAILED", "NODE_FAIL", "OUT_OF_MEMORY", "PREEMPTED",
    "REVOKED", "TIMEOUT",
}  # fmt: skip
"""States of a job that does not come back."""


class SchedulerError(K25Error):
    """SLURM refuses, cannot be reached, or is not installed."""


def ask(*command: str, patience_s: float = 0.0, answer_s: float = ANSWER_S) -> str:
    """Run a SLURM command and return what it prints.

    Args:
        command: the program and its arguments; no shell is involved.
        patience_s: how long to ask again while the answer means trouble that passes (`passing`); lines say
            so.
        answer_s: time limit of the command.

    Raises:
        SchedulerError: the command is not installed, or fails; with its own message.
    """
    start_s, told_s = time.monotonic(), -TELL_S
    while True:
        trouble, printed = attempt(command, answer_s)
        if printed is not None:
            return printed
        waited_s = time.monotonic() - start_s
        is_silent = trouble.startswith(SILENT)
        limit_s = min(patience_s, SILENT_S) if is_silent else patience_s
        if waited_s >= limit_s or not (is_silent or passes(trouble)):
            raise SchedulerError(f"{' '.join(command)}: {trouble}")
        if waited_s - told_s >= TELL_S:
            told_s = waited_s
            say(
                f"{' '.join(command)}: {trouble}: that passes; asking again, {waited_s:.0f} of at most "
                f"{limit_s:g} s"
            )
        time.sleep(RETRY_S)


def attempt(command: Sequence[str], answer_s: float) -> tuple[str, str | None]:
    """What went wrong when a SLURM command was run once, and what it printed, None if something did.

    Raises `SchedulerError` if it is not installed.
    """
    try:
        done = subprocess.run(
            command,
            env=environment(),
            stdin=subprocess.DEVNULL,
            capture_output=True,
            encoding="utf-8",
            errors="replace",
            timeout=answer_s,
            check=False,
        )
    except FileNotFoundError as error:
        raise SchedulerError(
            f"{command[0]} is not on PATH: submit from a node of the cluster, or view the script with "
            "--dry-run"
        ) from error
    except subprocess.TimeoutExpired:
        return f"the answer timed out after {answer_s:g} s", None
    except OSError as error:  # No process can be started at this moment, or its file cannot be read.
        return str(error), None
    if done.returncode == 0:
        return "", done.stdout
    words = (done.stderr or done.stdout).strip()
    return words or f"{SILENT} {done.returncode}", None


def say(text: str) -> None:
    """Tell the user, or the supervisor's log, what is waited for."""
    print(f"[{time.strftime('%Y-%m-%d %H:%M:%S')}] {text}", flush=True)


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
    # The number of a job array is also that of one of its tasks, and squeue answers with all of them.
    wanted = f"%A|{line_format}"
    command = ["squeue", "--noheader", f"--jobs={job_id}", "--states=all", f"--format={wanted}"]
    try:
        printed = ask(*command, patience_s=patience_s)
    except SchedulerError as error:
        if "Invalid job id" in str(error):
            return ""
        raise
    for line in printed.splitlines():
        number, separator, answer = line.partition("|")
        if number.strip() == str(job_id) or not separator:
            return answer if separator else line
    return ""
