"""Shrunk runs that `launch.slurm` submits to a real SLURM, and what tests do to them."""

import os
import re
import signal
import sys
from pathlib import Path

from k25_train.metrics.sinks import Row
from launch.attempts import Attempts
from launch.history import Attempt
from tests.helpers.interrupted_runs import long_run, rows
from tests.helpers.slurm_cluster import Slurm
from tests.helpers.torchrun_jobs import strings

START_S = 240.0
"""Most seconds until a submitted run trains, on a busy machine."""
END_S = 300.0
"""Most seconds from a fault to the end of the run."""
TWO_NODES = [
    "cluster=local_slurm", "cluster.nodes=2", "cluster.gpus_per_node=1", "parallelism.pp=1",
    "parallelism.vpp=1", "parallelism.ep=2", "cluster.slurm.restart_wait_s=1",
    "cluster.slurm.preflight=false",
]  # fmt: skip
"""Overrides of a run on two nodes with one rank each, without preflight."""


class SubmittedRun:
    """A run that is queued or running."""

    def __init__(self, cluster: Slurm, data: Path, folder: Path, *overrides: str) -> None:
        """Submit it, as a user does."""
        self.cluster = cluster
        self.folder = folder
        self.command = ["launch.slurm", *long_run(data, folder, *TWO_NODES, *overrides)]
        self.printed = cluster.ask(sys.executable, "-m", *self.command)
        match = re.search(r"submitted job (\d+)", self.printed)
        assert match is not None, self.printed
        self.job_id = int(match[1])

    @property
    def state(self) -> str:
        """The job's state, such as RUNNING."""
        return self.cluster.state(self.job_id)

    @property
    def comment(self) -> str:
        """What squeue shows as the job's comment."""
        command = ["squeue", "--noheader", f"--jobs={self.job_id}", "--states=all", "--format=%k"]
        return self.cluster.ask(*command).strip()

    @property
    def log(self) -> str:
        """The supervisor's log so far."""
        path = self.folder / "supervisor.log"
        return path.read_text() if path.exists() else ""

    @property
    def attempts(self) -> list[Attempt]:
        """The attempts so far."""
        return Attempts(self.folder).history()

    def rows(self) -> list[Row]:
        """The metrics so far."""
        return rows(self.folder) if (self.folder / "metrics.jsonl").exists() else []

    def wait_for_step(self, step: int) -> None:
        """Return when the metrics reach it."""
        self.cluster.wait_until(lambda: any(row["step"] >= step for row in self.rows()), START_S, self.folder)

    def wait_for_attempt(self, number: int) -> None:
        """Return when it has started. After a requeue SLURM itself lets a job wait, until its old
        credentials are forgotten."""
        self.cluster.wait_until(lambda: len(self.attempts) >= number, START_S, self.folder)

    def wait_for_end(self) -> str:
        """The job's last state."""
        over = ("COMPLETED", "FAILED", "CANCELLED", "TIMEOUT", "NODE_FAIL")
        self.cluster.wait_until(lambda: self.state in over, END_S, self.folder)
        return self.state

    def processes(self) -> list[int]:
        """Living processes that were started for this run, on any node."""
        return self.cluster.processes(f"{self.folder}/attempts/")

    def rank_log(self, attempt: int, rank: int) -> str:
        """What a rank has printed."""
        return (self.folder / f"attempts/{attempt}/rank_{rank}.log").read_text()

    def signal_rank(self, number: int, what: signal.Signals) -> None:
        """Send a rank a signal, bypassing everything that supervises it."""
        (pid,) = [pid for pid in self.processes() if f"RANK={number}" in strings(pid, "environ")]
        os.kill(pid, what)

    def kill_step(self, node: str) -> None:
        """SIGKILL to SLURM's own process for the ranks of a node, of which they are descendants."""
        own = {
            parent_of(pid) for pid in self.processes() if f"SLURMD_NODENAME={node}" in strings(pid, "environ")
        }
        (pid,) = own & set(self.cluster.processes("slurmstepd: "))
        os.kill(pid, signal.SIGKILL)

    def lose_node(self, node: str) -> None:
        """SIGKILL to everything of a node, and its slurmd is gone permanently."""
        of_node = [pid for pid in self.processes() if f"SLURMD_NODENAME={node}" in strings(pid, "environ")]
        self.kill_step(node)
        for pid in (*self.cluster.slurmds(node), *of_node):
            os.kill(pid, signal.SIGKILL)


def parent_of(pid: int) -> int:
    """The parent of a process."""
    return int(Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[1])
