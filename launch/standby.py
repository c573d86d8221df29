"""Puts a job back into the queue whose first node is lost, and the supervisor with it; on the last node.

    python -m launch.standby RUN_FOLDER JOB_ID NODE,NODE,...

SLURM (22.05) takes a lost node out of a job with `--no-kill` and lets the job go on. Without a supervisor it
would hold its other nodes, with nothing running there, until its time is over.
"""

import contextlib
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path

from k25_train.entry import run_command
from k25_train.run_folder.jobs import SchedulerError
from launch import scheduler, srun, started_by
from launch.forwarding import hang_up_with_parent
from launch.output import log, redirect
from launch.requeueing import Job, was_requeued
from launch.submission import SUPERVISOR_LOG, Submission

LOOK_S = 30.0
"""Seconds between looks at the job."""
NUM_LOOKS = 2
"""Looks in a row that have to find the first node gone, or the job over."""
END_S = 5.0
"""Longest time that the step may take to end."""


class Standby:
    """The supervisor's side: the step that watches over it."""

    def __init__(self, submission: Submission, job_id: int, allocated: Sequence[str]) -> None:
        """`allocated` are the job's nodes, in SLURM's order."""
        self.submission = submission
        self.job_id = job_id
        self.allocated = list(allocated)
        self._step: subprocess.Popen[bytes] | None = None

    def keep(self, nodes: Sequence[str]) -> None:
        """Have the step run, if not already, on the last of these nodes; a job of one node has none."""
        if self._step is not None and self._step.poll() is None:
            return
        if self._step is not None:
            log(f"the standby ended with status {self._step.returncode}; it is started again")
        others = [node for node in nodes if node != self.allocated[0]]
        if not others:
            return
        arguments = [self.submission.run, str(self.job_id), ",".join(self.allocated)]
        command = [
            *srun.srun(self.submission, others[-1:]),
            sys.executable,
            "-m",
            "launch.standby",
            *arguments,
        ]
        # What it has to say is in supervisor.log, also when this srun is lost.
        try:
            self._step = subprocess.Popen(
                command, stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
            )
        except OSError as error:
            # The run can do without.
            log(f"the standby could not be started: {error}")

    def end(self) -> None:
        """End the step: the supervisor has done its work."""
        if self._step is None or self._step.poll() is not None:
            return
        self._step.terminate()
        try:
            self._step.wait(END_S)
        except subprocess.TimeoutExpired:
            self._step.kill()
            self._step.wait()


def wait_for_loss(first: str, own: str, nodes_of: Callable[[], list[str]], pause: Callable[[], None]) -> bool:
    """Wait until the job runs without its first node; False if there is nothing left to wait for.

    Args:
        first: the first node.
        own: this node; SLURM cannot end what runs there if it has lost the node.
        nodes_of: the job's nodes, none if it does not run; raises `SchedulerError` if SLURM does not answer.
        pause: sleeps between looks.
    """
    num_gone = num_over = 0
    while True:
        with contextlib.suppress(SchedulerError):
            nodes = nodes_of()
            if nodes and own not in nodes:
                return False
            num_gone = num_gone + 1 if nodes and first not in nodes else 0
            num_over = 0 if nodes else num_over + 1
            if NUM_LOOKS in (num_gone, num_over):
                return num_gone == NUM_LOOKS
        pause()


def main() -> None:
    """Watch over the supervisor of a job."""
    run_command(_run, output_goes_on=True)


def _run() -> int:
    run, number, names = started_by.arguments("RUN_FOLDER JOB_ID NODE,NODE,...")
    # A request to stop is the supervisor's.
    signal.signal(signal.SIGUSR1, signal.SIG_IGN)
    # Without SLURM's process on this node, nobody else would end it.
    hang_up_with_parent()
    job_id, allocated = started_by.count("JOB_ID", number), names.split(",")
    redirect(Path(run) / SUPERVISOR_LOG)
    job = Job(Submission.read(Path(run)), job_id, allocated, started_by.variable("SLURM_JOB_PARTITION"))
    first, own = allocated[0], started_by.variable("SLURMD_NODENAME")
    while True:
        if not wait_for_loss(first, own, lambda: scheduler.nodes_of(job_id, 0.0), lambda: time.sleep(LOOK_S)):
            return 0
        # The log may have been continued in a new file meanwhile.
        with contextlib.suppress(OSError):
            redirect(Path(run) / SUPERVISOR_LOG)
        try:
            # Its number may be that of a later start, on other nodes, of which this one knows nothing.
            if was_requeued(job_id):
                return 0
            return job.requeue(f"{first} is lost, and with it the supervisor", set())
        except SchedulerError as error:
            # Nobody else would do it.
            log(f"job {job_id} could not be put back into the queue: {error}")


if __name__ == "__main__":
    main()
