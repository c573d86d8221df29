"""What SLURM's queue says of jobs, asked once and briefly: status is shown without it, too."""

import getpass
from collections.abc import Collection
from dataclasses import dataclass
from pathlib import Path

from k25_train.run_folder.jobs import SchedulerError, ask
from launch.submission import SCRIPT

ANSWER_S = 5.0
"""Longest wait for squeue: whoever asks for a status waits for it."""
# Not %i, which is no job id for a task of an array.
_FIELDS = "%A|%T|%D|%N|%r|%k|%o"


@dataclass(frozen=True, slots=True, kw_only=True)
class QueuedJob:
    """A job in squeue."""

    id: int
    state: str
    """SLURM's name, such as RUNNING."""
    num_nodes: int
    nodelist: str
    """As SLURM abbreviates it; empty while it waits."""
    reason: str
    """Why it waits; empty if it does not."""
    comment: str
    script: str
    """The batch script's path; empty if SLURM does not tell."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Queue:
    """Jobs that SLURM knows; it forgets them some minutes after their end."""

    jobs: dict[int, QueuedJob]
    trouble: str = ""
    """Why SLURM could not be asked; empty if it was."""


def no_queue() -> Queue:
    """For runs that are none of SLURM's."""
    return Queue(jobs={}, trouble="no SLURM")


def jobs_of(job_ids: Collection[int]) -> Queue:
    """These jobs, of any user."""
    if not job_ids:
        return no_queue()
    try:
        return _ask(f"--jobs={','.join(map(str, sorted(job_ids)))}")
    except SchedulerError as error:
        # Where the only one is forgotten, SLURM calls its number invalid.
        return Queue(jobs={}) if "Invalid job id" in str(error) else _untold(error)


def jobs_of_user() -> Queue:
    """All jobs of this user."""
    try:
        return _ask(f"--user={getpass.getuser()}")
    except (SchedulerError, KeyError, OSError) as error:
        return _untold(error)


def run_folders(queue: Queue) -> list[Path]:
    """Folders of the runs that jobs belong to, by the script that was submitted."""
    scripts = [Path(job.script) for job in queue.jobs.values() if job.script]
    return [script.parent for script in scripts if script.name == SCRIPT and script.is_absolute()]


def _untold(error: Exception) -> Queue:
    return Queue(jobs={}, trouble=" ".join(str(error).split()) or type(error).__name__)


def _ask(selection: str) -> Queue:
    command = ["squeue", "--noheader", "--states=all", selection, f"--format={_FIELDS}"]
    found = [
        job for line in ask(*command, answer_s=ANSWER_S).splitlines() if (job := parse(line)) is not None
    ]
    return Queue(jobs={job.id: job for job in found})


def parse(line: str) -> QueuedJob | None:
    """A line of squeue; None for what is none, such as a job of an array that waits."""
    fields = line.strip().split("|")
    if len(fields) < 7 or not fields[0].isdecimal():
        return None
    number, state, num_nodes, nodelist, reason, *comment, script = fields
    text = "|".join(comment)
    return QueuedJob(
        id=int(number),
        state=state,
        num_nodes=int(num_nodes) if num_nodes.isdecimal() else 0,
        nodelist=nodelist,
        reason="" if reason == "None" else reason,
        comment="" if text == "(null)" else text,
        script="" if script == "(null)" else script,
    )
