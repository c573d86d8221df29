"""The steps of SLURM that an attempt consists of, as srun's command lines.

rendezvous   on the first node: where can ranks meet?
preflight    a process a device, without torchrun, which would not start unless every node did
training     a process a node, which becomes torchrun
"""

import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path

from launch.rendezvous import JOIN_S
from launch.scheduler import SchedulerError, last_json
from launch.submission import Submission


def srun(nodes: Sequence[str], tasks_per_node: int = 1) -> list[str]:
    """srun with tasks on each of these nodes, which have all of it."""
    return [
        "srun",
        f"--nodes={len(nodes)}",
        f"--ntasks={len(nodes) * tasks_per_node}",
        f"--ntasks-per-node={tasks_per_node}",
        f"--nodelist={','.join(nodes)}",
        # The step before may not be gone in SLURM's books, and a lost node ends the step, not the job.
        "--overlap",
        "--no-kill=off",
        "--cpu-bind=none",
        "--mem=0",
        # Else SBATCH_EXPORT=NONE of the shell that submitted keeps the script's variables from the ranks.
        "--export=ALL",
    ]


def find_rendezvous(
    submission: Submission, first_node: str, log: Path, is_over: Callable[[], bool]
) -> tuple[str, str]:
    """Address and port, as the first node knows them.

    It is asked outside of any container, whose image may take longer to come than an answer may.

    Raises `SchedulerError` if it cannot say, or `is_over()` meanwhile; ValueError if it says no such thing.
    """
    interface = [] if submission.interface is None else [submission.interface]
    port = str(submission.rendezvous_port)
    command = [*srun([first_node]), sys.executable, "-m", "launch.rendezvous", port, *interface]
    deadline = time.monotonic() + JOIN_S
    with (
        log.open("a") as errors,
        subprocess.Popen(
            command,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=errors,
            text=True,
            errors="replace",
        ) as step,
    ):
        while True:
            try:
                printed, _ = step.communicate(timeout=0.5)
                break
            except subprocess.TimeoutExpired:
                if is_over() or time.monotonic() >= deadline:
                    step.kill()
    if step.returncode:
        raise SchedulerError(
            f"{first_node} did not say where ranks can meet (srun's status {step.returncode}), see {log}"
        )
    answer = last_json(printed)
    return answer["address"], answer["port"]


def training(submission: Submission, number: int, nodes: Sequence[str], meeting: Sequence[str]) -> list[str]:
    """The command of an attempt's ranks.

    Args:
        submission: of the run.
        number: of the attempt.
        nodes: on which it runs.
        meeting: address and port of the rendezvous.
    """
    # One that fails ends all: the others would wait for it.
    ranks = ["launch.node", submission.run, str(number), str(len(nodes)), *meeting]
    return [*srun(nodes), "--kill-on-bad-exit=1", *python(submission), *ranks]


def preflight(
    submission: Submission, folder: Path, nodes: Sequence[str], meeting: Sequence[str]
) -> list[str]:
    """The command that checks the nodes of an attempt, and leaves the report in `folder`; arguments as of
    `training`."""
    # One that fails ends no other: those that are silent are named by those that are not.
    options = ["--kill-on-bad-exit=0", "--overcommit"]
    checks = ["launch.preflight_rank", str(folder), submission.run, ",".join(nodes), *meeting]
    return [*srun(nodes, submission.ranks_per_node), *options, *python(submission), *checks]


def python(submission: Submission) -> list[str]:
    """What runs a module on a node, in the container if there is one."""
    return [*submission.container, submission.python, "-m"]
