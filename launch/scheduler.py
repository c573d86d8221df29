"""The few questions that are asked of SLURM, through its own commands."""

import json
import os
import re
import subprocess
import time
from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

from k25_train.errors import K25Error

ANSWER_S = 60.0
"""Longest that a command of SLURM may take; they wait for a controller that is down."""
RETRY_S = 10.0
"""Pause before the same question is asked again."""
PASSING = (
    "Unable to contact slurm controller", "timed out", "no answer", "Zero Bytes were transmitted",
    "Communication connection failure", "transitional state",
)  # fmt: skip
"""Words of errors that go away by themselves."""
USABLE = {"idle", "mixed", "allocated", "completing", "planned", "reserved"}
"""States in which a node can run a step."""
HARMLESS_FLAGS = "-$@!"
"""What SLURM appends to the state of a node that it has plans with; others, such as * for one that does not
respond, mean that it cannot run a step."""


class SchedulerError(K25Error):
    """SLURM refuses, cannot be reached, or is not installed."""


def ask(*command: str, patience_s: float = 0.0) -> str:
    """What a command of SLURM prints.

    Args:
        command: the program and its arguments; no shell sees them.
        patience_s: how long to try again where the controller does not answer.

    Raises:
        SchedulerError: it is not installed, or fails, with its own words.
    """
    deadline = time.monotonic() + patience_s
    while True:
        try:
            done = subprocess.run(
                command,
                env=environment(),
                capture_output=True,
                text=True,
                errors="replace",
                timeout=ANSWER_S,
                check=False,
            )
        except FileNotFoundError as error:
            raise SchedulerError(
                f"{command[0]} is not on PATH: submit from a node of the cluster, or look at the script with "
                "--dry-run"
            ) from error
        except subprocess.TimeoutExpired:
            trouble = f"no answer within {ANSWER_S:g} s"
        else:
            if done.returncode == 0:
                return done.stdout
            trouble = (done.stderr or done.stdout).strip()
        if time.monotonic() >= deadline or not any(words in trouble for words in PASSING):
            raise SchedulerError(f"{' '.join(command)}: {trouble}")
        time.sleep(RETRY_S)


def environment() -> dict[str, str]:
    """This process's, without the variables by which users have sinfo and squeue leave things out."""
    hiding = ("SINFO_", "SQUEUE_")
    return {name: value for name, value in os.environ.items() if not name.startswith(hiding)}


def submit(script: Path) -> int:
    """Queue the script; returns the job's id. Raises `SchedulerError` in sbatch's words."""
    return int(ask("sbatch", "--parsable", str(script)).split(";")[0])


def estimate_start(script: Path) -> str:
    """What SLURM says of when the script could start.

    It cannot while nodes are down for which the job would wait, so that is no reason to refuse one.
    """
    command = ["sbatch", "--test-only", str(script)]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=ANSWER_S, check=False)
    except (OSError, subprocess.TimeoutExpired) as error:
        return f"SLURM cannot say when it starts ({error})"
    # The job it names is none.
    told = re.sub(r"^(sbatch: )?(Job \d+ )?", "", done.stderr.strip())
    return f"SLURM cannot say when it starts ({told})" if done.returncode else told


@dataclass(frozen=True, slots=True, kw_only=True)
class Partition:
    """A queue."""

    num_nodes: int
    """In whatever state."""
    is_default: bool
    """Whether jobs come into it that name none."""


def partitions() -> dict[str, Partition]:
    """Name -> queue, in the order of their names."""
    found: dict[str, Partition] = {}
    # A line for each partition and state of nodes would need adding up; --summarize gives one a partition.
    for line in sorted(ask("sinfo", "--all", "--noheader", "--summarize", "--format=%R %P %D").splitlines()):
        name, marked, num_nodes = line.split()
        found[name] = Partition(num_nodes=int(num_nodes), is_default=marked.endswith("*"))
    return found


def job_state(job_id: int, patience_s: float = 0.0) -> str | None:
    """State of a job such as RUNNING, or None if SLURM no longer has it."""
    told = about_job(job_id, "%T", patience_s).split()
    return told[0] if told else None


def nodes_of(job_id: int, patience_s: float) -> list[str]:
    """Nodes that a job has while it runs, else none; SLURM takes lost nodes from it, even if they return."""
    state, *nodelist = about_job(job_id, "%T %N", patience_s).split() or [""]
    return expand(nodelist[0]) if state == "RUNNING" and nodelist else []


def about_job(job_id: int, form: str, patience_s: float) -> str:
    """What squeue says of a job in this format; nothing if SLURM no longer has it."""
    command = ["squeue", "--noheader", f"--jobs={job_id}", "--states=all", f"--format={form}"]
    try:
        return ask(*command, patience_s=patience_s)
    except SchedulerError as error:
        if "Invalid job id" in str(error):
            return ""
        raise


def expand(nodelist: str) -> list[str]:
    """Node names of a list such as `n[1-3,7]`, in SLURM's order, which is that of node ids in a step."""
    return ask("scontrol", "show", "hostnames", nodelist).split()


def unusable(nodes: Iterable[str], patience_s: float = 0.0) -> dict[str, str]:
    """Node -> state of those that cannot run a step: down, drained or draining, failing, not responding."""
    states = node_states(patience_s, "--all", f"--nodes={','.join(nodes)}")
    return {node: state for node, state in states.items() if not is_usable(state)}


def members(partition: str, patience_s: float = 0.0) -> set[str]:
    """Nodes of a partition, in whatever state: those that are down may be mended."""
    return set(node_states(patience_s, f"--partition={partition}"))


def node_states(patience_s: float, *selection: str) -> dict[str, str]:
    """Node -> state, of those that options of sinfo select."""
    told = ask("sinfo", "--noheader", "--Node", *selection, "--format=%N %T", patience_s=patience_s)
    return dict(line.split() for line in told.splitlines())


def is_usable(state: str) -> bool:
    """Whether a node in this state can run a step."""
    return state.rstrip(HARMLESS_FLAGS) in USABLE


def requeue(job_id: int, least: int, most: int, without: Collection[str], patience_s: float) -> None:
    """Put the running job back into the queue, under the same id.

    Args:
        job_id: the job.
        least: nodes on which it comes back, as its number of tasks allows no more.
        most: most nodes that it may have.
        without: nodes that it must not get from now on, besides those that it must not get already.
        patience_s: how long to try again where the controller does not answer.
    """
    excluded = {*excluded_nodes(job_id, patience_s), *without} if without else set()
    try:
        ask("scontrol", "requeue", str(job_id), patience_s=patience_s)
    except SchedulerError:
        # Of a request that was carried out the answer may have been lost.
        if job_state(job_id, patience_s) == "RUNNING":
            raise
    # Tasks and CPUs were counted when the job was submitted, and would keep it waiting for as many nodes.
    size = [f"NumNodes={node_range(least, most)}", f"NumTasks={least}", f"NumCPUs={least}"]
    if excluded:
        size.append(f"ExcNodeList={','.join(sorted(excluded))}")
    ask("scontrol", "update", f"JobId={job_id}", *size, patience_s=patience_s)


def excluded_nodes(job_id: int, patience_s: float) -> list[str]:
    """Nodes that a job must not get."""
    told = ask("scontrol", "show", "job", str(job_id), patience_s=patience_s)
    match = re.search(r"ExcNodeList=(\S+)", told)
    return [] if match is None or match[1] == "(null)" else expand(match[1])


def node_range(least: int, most: int) -> str:
    """Numbers of nodes as sbatch and scontrol take them."""
    return str(most) if least == most else f"{least}-{most}"


def first_to_fail(srun_log: str) -> str | None:
    """The node that srun named first when it failed, or tasks on it did."""
    match = re.search(
        r"^srun: error: (?:Node failure on (\S+)|(\S+): tasks? [\d,-]+: )", srun_log, re.MULTILINE
    )
    return (match[1] or match[2]) if match else None


def last_json(printed: str) -> dict[str, str]:
    """The last line that is a JSON object, behind whatever a prolog or a container printed before."""
    lines: Sequence[str] = [line for line in printed.splitlines() if line.startswith("{")]
    if not lines:
        raise ValueError(printed)
    answer: dict[str, str] = json.loads(lines[-1])
    return answer
