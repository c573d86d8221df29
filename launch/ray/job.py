"""In a job of SLURM: Ray on all of its nodes, and `launch.supervisor` as long as it lives.

    python -m launch.ray.job RUN_FOLDER [TOKEN]

A batch script that `python -m launch.ray` has submitted ends with it. Attempts come and go on one cluster.
"""

import os
from pathlib import Path

from k25_train.entry import REFUSED, run_command
from k25_train.errors import K25Error
from launch import scheduler, started_by
from launch.attempt_steps import StopRequest
from launch.output import log
from launch.ray.cluster import running
from launch.ray.plan import ADDRESS, LOG, Place, of_job
from launch.srun import find_rendezvous
from launch.submission import Submission
from launch.supervisor import supervise


def main() -> None:
    """Start Ray, then supervise the run of the given folder in this SLURM job."""
    run_command(_run, output_goes_on=True)


def _run() -> int:
    folder, *token = started_by.arguments("RUN_FOLDER ...")
    run = Path(folder)
    # Signals are handled from here on; one that comes early is the supervisor's first.
    stop = StopRequest()

    def is_over() -> bool:
        return stop.signal is not None

    try:
        submission = Submission.read(run)
        nodes = scheduler.expand(started_by.variable("SLURM_JOB_NODELIST"))
        place = Place(*find_rendezvous(submission, nodes[0], run / LOG, is_over))
        with running(of_job(submission, nodes, place), os.environ, run, run / LOG) as cluster:
            cluster.wait(is_over)
            log(f"Ray is at {place.address}:{place.port}, on {len(nodes)} nodes")
            os.environ.update(cluster.environment | {ADDRESS: f"{place.address}:{place.port}"})
            return supervise(run, "".join(token[:1]), stop)
    except (K25Error, OSError, ValueError) as error:
        log(f"{type(error).__name__}: {error}")
        return REFUSED


if __name__ == "__main__":
    main()
