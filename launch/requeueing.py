"""The SLURM job of a supervisor: which of its nodes are sound, and how it goes back into the queue."""

import os
import signal
from collections.abc import Collection, Sequence

from k25_train.errors import K25Error
from k25_train.run_folder import jobs
from launch import scheduler
from launch.output import log
from launch.submission import Submission

PATIENCE_S = 3600.0
"""How long SLURM's controller may be unreachable while the run goes on."""


class RequeuedError(K25Error):
    """The job of this process was put back into the queue: whatever runs under its number now is another
    supervisor's."""


def was_requeued(job_id: int) -> bool:
    """Whether the job was requeued since this process was started, which SLURM could not end: on a node that
    it lost."""
    num_restarts = scheduler.num_restarts(job_id, PATIENCE_S)
    return num_restarts is not None and num_restarts != int(os.environ.get("SLURM_RESTART_COUNT", "0"))


def check_is_own(job_id: int) -> None:
    """Raise `RequeuedError` if the job was requeued since this process was started."""
    if was_requeued(job_id):
        raise RequeuedError(
            f"job {job_id} was put back into the queue, and SLURM could not end this supervisor: it leaves "
            "the run to the next one"
        )


def ends_for_good(job_id: int) -> bool:
    """Whether this process's job, which is about to end, does not come back: it was not requeued."""
    # A job that was cancelled is COMPLETING, as one that was requeued; one that was requeued may run again.
    return jobs.job_state(job_id, PATIENCE_S) in ("RUNNING", "COMPLETING") and not was_requeued(job_id)


class Job:
    """The job in which this process runs."""

    def __init__(self, submission: Submission, job_id: int, nodes: Sequence[str], partition: str) -> None:
        """`nodes` are the job's, in SLURM's order."""
        self.submission = submission
        self.id = job_id
        self.allocated = list(nodes)
        self.partition = partition

    def unusable(self, nodes: Sequence[str]) -> dict[str, str]:
        """Node -> state, of those that SLURM finds unable to run a step or has taken away from the job."""
        states = scheduler.unusable(nodes, PATIENCE_S)
        kept = scheduler.nodes_of(self.id, PATIENCE_S)
        taken = {node: "no longer the job's" for node in nodes if kept and node not in kept}
        return taken | states

    def has_lost_supervisor(self) -> bool:
        """Whether SLURM has taken away the first node, on which the supervisor is, and lets the job go on.

        Raises `RequeuedError` if the job is no longer this process's.
        """
        check_is_own(self.id)
        kept = scheduler.nodes_of(self.id, PATIENCE_S)
        return bool(kept) and self.allocated[0] not in kept

    def too_few_sound(self, lost: dict[str, str], unfit: Collection[str]) -> str:
        """In words, why the run cannot go on with the job's nodes.

        Args:
            lost: node -> state, of those that cannot run a step.
            unfit: nodes that failed a preflight.
        """
        unsound = [f"{node} {state}" for node, state in lost.items()]
        unsound += [f"{node} failed preflight" for node in sorted(set(unfit) - lost.keys())]
        return (
            f"{len(self.allocated) - len(unsound)} of {len(self.allocated)} nodes are sound "
            f"({', '.join(unsound)}), the run needs one of {self.submission.legal_nodes}"
        )

    def too_few_others(self, unfit: Collection[str]) -> str | None:
        """Why the job would wait forever if it went back into the queue without these nodes, or None."""
        if not unfit:
            return None
        # SLURM keeps excluding the nodes of earlier requeues.
        excluded = {*unfit, *scheduler.excluded_nodes(self.id, PATIENCE_S)}
        others = scheduler.members(self.partition, PATIENCE_S) - excluded
        if len(others) >= self.submission.legal_nodes[0]:
            return None
        return f"partition {self.partition} has only {len(others)} others"

    def requeue(self, reason: str, unfit: Collection[str]) -> int:
        """Put the job back into the queue under its id, unless it was cancelled or SLURM requeues it itself.

        Args:
            reason: why, for the log.
            unfit: nodes that it must not get again.

        Returns:
            The exit status of the supervisor.

        Raises `RequeuedError` if the job is no longer this process's.
        """
        # 1. Is the job still ours to requeue?
        state = jobs.job_state(self.id, PATIENCE_S)
        if state != "RUNNING":
            log(f"{reason}; job {self.id} is {state}, so the supervisor does not requeue it")
            return 1
        check_is_own(self.id)
        # 2. For how many nodes?
        least, most = self.size({*self.unusable(self.allocated), *unfit})
        nodes = scheduler.node_range(least, most)
        log(
            f"{reason}; job {self.id} goes back to the queue, for {nodes} nodes; should SLURM hold it there "
            f"(squeue --jobs={self.id} --format='%T %r'): scontrol release {self.id}"
        )
        if unfit:
            command = f"scontrol update JobId={self.id} ExcNodeList="
            log(f"it will not get {', '.join(sorted(unfit))} again; when they are fixed: {command}")
        # 3. SLURM ends a job that it requeues with all its processes, scontrol included, by SIGTERM first.
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
        scheduler.requeue(self.id, least, most, unfit, PATIENCE_S)
        return 0

    def size(self, excluded: Collection[str]) -> tuple[int, int]:
        """The least and the most nodes to ask for: SLURM gives the most if it has them, otherwise the least.

        The least are as many as are sound now, or the fewest on which the run can go on; the most are those
        that there are, up to all of them with their spares.

        Args:
            excluded: nodes of the job that it cannot or must not use.
        """
        legal, spares = self.submission.legal_nodes, self.submission.spare_nodes
        if not excluded:
            return legal[-1], legal[-1] + spares
        num_sound = len(set(self.allocated) - set(excluded))
        least = max((number for number in legal if number <= num_sound), default=legal[0])
        if not spares:
            return least, legal[-1]
        apart = {*excluded, *self.allocated, *scheduler.excluded_nodes(self.id, PATIENCE_S)}
        num_there = num_sound + scheduler.num_idle(self.partition, apart, PATIENCE_S)
        most = legal[-1] + spares
        return least, min(most, num_there) if num_there > least else most
