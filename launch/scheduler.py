"""Queries and requests to SLURM, through its command-line tools."""

import json
import os
import re
import subprocess
import time
from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

from k25_train.run_folder.jobs import ANSWER_S, ENDED, SchedulerError, ask, job_state, query_job

USABLE = {"idle", "mixed", "allocated", "completing", "planned", "reserved"}
"""Node states in which a step can run."""
HARMLESS_FLAGS = "-$@!"
"""Suffixes of a node's state that mean planned changes. Any other, such as * for a node that does not
respond, means that no step can run."""

HEARD_S = 60.0
"""Longest time until a controller that was started again has heard of nodes that are there."""
LOOK_S = 1.0
"""Seconds between looks at nodes meanwhile."""


def jobs_submitted_as(token: str, patience_s: float) -> list[int]:
    """This user's queued and running jobs that were submitted from a script whose path has the token."""
    options = [f"--user={os.getuid()}", "--noheader", "--format=%A|%o"]
    lines = [line.split("|", 1) for line in ask("squeue", *options, patience_s=patience_s).splitlines()]
    return sorted({int(job[0]) for job in lines if len(job) == 2 and token in job[1]})


def cancel(job_id: int, patience_s: float) -> None:
    """End a job; one that has ended already is fine."""
    try:
        ask("scancel", str(job_id), patience_s=patience_s)
    except SchedulerError:
        if job_state(job_id, patience_s) not in {None, *ENDED}:
            raise


def estimate_start(script: Path) -> str:
    """SLURM's estimate of when the script could start.

    SLURM has none while nodes are down that the job would wait for, so a failure is no reason to reject a
    job.
    """
    command = ["sbatch", "--test-only", str(script)]
    try:
        done = subprocess.run(
            command, capture_output=True, encoding="utf-8", errors="replace", timeout=ANSWER_S, check=False
        )
    except (OSError, subprocess.TimeoutExpired) as error:
        return f"SLURM cannot estimate the start ({error})"
    # The message names a job that does not exist.
    estimate = re.sub(r"^(sbatch: )?(Job \d+ )?", "", done.stderr.strip())
    return f"SLURM cannot estimate the start ({estimate})" if done.returncode else estimate


@dataclass(frozen=True, slots=True, kw_only=True)
class Partition:
    """A partition of the cluster, which is a queue for jobs."""

    num_nodes: int
    """Number of nodes, in any state."""
    is_default: bool
    """Whether jobs that name no partition run in it."""


def partitions(patience_s: float = 0.0) -> dict[str, Partition]:
    """Name -> partition, sorted by name."""
    found: dict[str, Partition] = {}
    # Without --summarize there is one line per partition and node state, to be added up.
    options = ["--all", "--noheader", "--summarize", "--format=%R %P %D"]
    for line in sorted(ask("sinfo", *options, patience_s=patience_s).splitlines()):
        name, marked, num_nodes = line.split()
        found[name] = Partition(num_nodes=int(num_nodes), is_default=marked.endswith("*"))
    return found


def nodes_of(job_id: int, patience_s: float) -> list[str]:
    """Nodes of a running job, none if it is not running; SLURM removes lost nodes, even if they return."""
    state, *nodelist = query_job(job_id, "%T %N", patience_s).split() or [""]
    return expand(nodelist[0]) if state == "RUNNING" and nodelist else []


def expand(nodelist: str) -> list[str]:
    """Node names of a list such as `n[1-3,7]`, in SLURM's order, which is also that of node ids in a step."""
    return ask("scontrol", "show", "hostnames", nodelist).split()


def unusable(nodes: Iterable[str], patience_s: float = 0.0) -> dict[str, str]:
    """Node -> state, of those that cannot run a step: down, drained, draining, failing, not responding."""
    selection = ("--all", f"--nodes={','.join(nodes)}")
    states = node_states(patience_s, *selection)
    # A controller that has just been started has not heard of its nodes yet, which run on.
    deadline = time.monotonic() + min(patience_s, HEARD_S)
    while any(map(is_unheard, states.values())) and time.monotonic() < deadline:
        time.sleep(LOOK_S)
        states = node_states(patience_s, *selection)
    return {node: state for node, state in states.items() if not is_usable(state)}


def members(partition: str, patience_s: float = 0.0) -> set[str]:
    """Nodes of a partition, in any state: those that are down may be repaired."""
    return set(node_states(patience_s, f"--partition={partition}"))


def node_states(patience_s: float, *selection: str) -> dict[str, str]:
    """Node -> state, of the nodes selected by options of sinfo."""
    printed = ask("sinfo", "--noheader", "--Node", *selection, "--format=%N %T", patience_s=patience_s)
    return dict(line.split() for line in printed.splitlines())


def num_idle(partition: str, without: Collection[str], patience_s: float) -> int:
    """Number of a partition's idle nodes apart from these."""
    states = node_states(patience_s, f"--partition={partition}")
    return sum(
        state.rstrip(HARMLESS_FLAGS) == "idle" for node, state in states.items() if node not in without
    )


def is_usable(state: str) -> bool:
    """Whether a node in this state can run a step."""
    return state.rstrip(HARMLESS_FLAGS) in USABLE


def is_unheard(state: str) -> bool:
    """Whether the controller has not heard of the node since it was started."""
    return state.startswith("unknown")


def requeue(job_id: int, least: int, most: int, without: Collection[str], patience_s: float) -> None:
    """Put the running job back into the queue, under the same id.

    Args:
        job_id: the job.
        least: smallest number of nodes with which it comes back.
        most: largest number of nodes: it gets as many as are free when it starts.
        without: nodes to exclude from now on, in addition to those excluded already.
        patience_s: how long to retry while the controller does not answer.
    """
    # 1. Requeue; SLURM may have done so although its answer got lost.
    facts = job_facts(job_id, patience_s)
    name = name_of(job_id, facts)
    try:
        ask("scontrol", "requeue", name, patience_s=patience_s)
    except SchedulerError:
        if job_state(job_id, patience_s) == "RUNNING":
            raise
    # 2. Change its size: with the CPUs counted at submission, it would wait for as many nodes. So it would
    #    with a number of tasks; but given that number, SLURM gives no more nodes than tasks, and no spares.
    size = [f"NumNodes={node_range(least, most)}", f"NumCPUs={least}"]
    if counts_tasks(facts):
        size.append(f"NumTasks={least}")
    if without:
        size.append(f"ExcNodeList={','.join(sorted({*excluded_in(facts), *without}))}")
    ask("scontrol", "update", f"JobId={name}", *size, patience_s=patience_s)


def job_facts(job_id: int, patience_s: float) -> str:
    """What SLURM says of a job, as NAME=VALUE."""
    # The number of a job array is also that of one of its tasks, and scontrol answers with all of them.
    records = ask("scontrol", "show", "job", str(job_id), patience_s=patience_s).split("\n\n")
    own = [record for record in records if re.match(rf"\s*JobId={job_id}\b", record)]
    return (own or records)[0]


def name_of(job_id: int, facts: str) -> str:
    """What scontrol calls this job alone: the number of an array's task may be that of the whole array."""
    task = re.search(r"\bArrayJobId=(\d+) ArrayTaskId=(\d+)\s", facts)
    return f"{task[1]}_{task[2]}" if task else str(job_id)


def counts_tasks(facts: str) -> bool:
    """Whether a job was submitted with a number of tasks for each node, and so with one for the job."""
    match = re.search(r"NtasksPerN\S*=(\d+)", facts)
    return match is not None and int(match[1]) > 0


def excluded_in(facts: str) -> list[str]:
    """Nodes that a job must not get, in what SLURM says of it."""
    match = re.search(r"ExcNodeList=(\S+)", facts)
    return [] if match is None or match[1] == "(null)" else expand(match[1])


def excluded_nodes(job_id: int, patience_s: float) -> list[str]:
    """Nodes that a job must not get."""
    return excluded_in(job_facts(job_id, patience_s))


def num_restarts(job_id: int, patience_s: float) -> int | None:
    """How often a job was requeued; None if SLURM does not say."""
    match = re.search(r"Restarts=(\d+)", job_facts(job_id, patience_s))
    return None if match is None else int(match[1])


def node_range(least: int, most: int) -> str:
    """A range of node counts in the form that sbatch and scontrol accept."""
    return str(most) if least == most else f"{least}-{most}"


def first_to_fail(srun_log: str) -> str | None:
    """The first node of which srun's log reports a failure, of the node or of a task on it."""
    match = re.search(
        r"^srun: error: (?:Node failure on (\S+)|(\S+): tasks? [\d,-]+: )", srun_log, re.MULTILINE
    )
    return (match[1] or match[2]) if match else None


def last_json(printed: str) -> dict[str, str]:
    """The last line that is a JSON object; a prolog or container may have printed other lines before."""
    lines: Sequence[str] = [line for line in printed.splitlines() if line.startswith("{")]
    if not lines:
        raise ValueError(printed)
    answer: dict[str, str] = json.loads(lines[-1])
    return answer
