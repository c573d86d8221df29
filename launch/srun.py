"""The SLURM steps of an attempt, as srun's command lines.

rendezvous   on the first node: the address and port at which ranks meet
preflight    one process per device, without torchrun, which would not start unless every node did
training     one process per node, which becomes torchrun
"""

import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path

from k25_train.run_folder.jobs import SchedulerError
from launch.rendezvous import JOIN_S
from launch.scheduler import last_json
from launch.submission import Submission


def srun(submission: Submission, nodes: Sequence[str], tasks_per_node: int = 1) -> list[str]:
    """srun with tasks on each of these nodes, which get all that the job has of the node."""
    cpus = submission.cpus_per_task
    return [
        "srun",
        f"--nodes={len(nodes)}",
        f"--ntasks={len(nodes) * tasks_per_node}",
        f"--ntasks-per-node={tasks_per_node}",
        f"--nodelist={','.join(nodes)}",
        # SLURM may still count the previous step, hence --overlap. A lost node ends the step, not the job.
        "--overlap",
        "--no-kill=off",
        "--cpu-bind=none",
        "--mem=0",
        # Otherwise SBATCH_EXPORT=NONE in the submitting shell keeps the script's variables from the ranks.
        "--export=ALL",
        # Otherwise a task gets one CPU, since srun does not look at what sbatch was asked for (SLURM 22.05).
        *([] if cpus is None else [f"--cpus-per-task={max(1, cpus // tasks_per_node)}"]),
        *submission.step_options,
    ]


def find_rendezvous(
    submission: Submission, first_node: str, log: Path, is_over: Callable[[], bool]
) -> tuple[str, str]:
    """Address and port for the rendezvous, as determined on the first node.

    The command runs outside the container, since pulling an image may take longer than the answer may.

    Raises:
        SchedulerError: the command fails, takes too long, or `is_over()` becomes true while it runs.
        ValueError: its output has no answer.
    """
    command = rendezvous(submission, first_node, sys.executable)
    deadline = time.monotonic() + JOIN_S
    with (
        log.open("a", encoding="utf-8") as errors,
        subprocess.Popen(
            command,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=errors,
            encoding="utf-8",
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
            f"{first_node} reported no rendezvous address (srun's status {step.returncode}), see {log}"
        )
    answer = last_json(printed)
    if not {"address", "port"} <= answer.keys():
        raise ValueError(printed)
    return answer["address"], answer["port"]


def rendezvous(submission: Submission, first_node: str, interpreter: str) -> list[str]:
    """The command that determines where ranks meet, on the first node."""
    interface = [] if submission.interface is None else [submission.interface, submission.address_family]
    port = str(submission.rendezvous_port)
    return [*srun(submission, [first_node]), interpreter, "-m", "launch.rendezvous", port, *interface]


def training(submission: Submission, number: int, nodes: Sequence[str], endpoint: Sequence[str]) -> list[str]:
    """The command that starts an attempt's ranks.

    Args:
        submission: the run's submission.
        number: the attempt's number.
        nodes: the attempt's nodes.
        endpoint: address and port.
    """
    # A task that fails ends all: the others would wait for it.
    ranks = ["launch.node", submission.run, str(number), str(len(nodes)), *endpoint]
    return [*srun(submission, nodes), "--kill-on-bad-exit=1", *python(submission), *ranks]


def preflight(
    submission: Submission, folder: Path, nodes: Sequence[str], endpoint: Sequence[str]
) -> list[str]:
    """The command that checks an attempt's nodes and writes the report to `folder`; otherwise as
    `training`."""
    # A task that fails does not end the others: they report which ones are silent.
    options = ["--kill-on-bad-exit=0", "--overcommit"]
    checks = ["launch.preflight_rank", str(folder), submission.run, ",".join(nodes), *endpoint]
    return [*srun(submission, nodes, submission.ranks_per_node), *options, *python(submission), *checks]


def python(submission: Submission) -> list[str]:
    """The command that runs a module on a node, in the container if there is one, after the site's setup."""
    return [*submission.container, *submission.node_start, submission.python, "-m"]
