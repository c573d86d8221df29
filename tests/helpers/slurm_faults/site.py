"""A SLURM of three nodes that takes one trial after another, and is as new before each."""

from __future__ import annotations

import os
import signal
import subprocess
from collections.abc import Sequence
from contextlib import ExitStack, suppress
from pathlib import Path

from k25_train.run_folder.rows_file import Row, read_rows
from tests.helpers.interrupted_runs import RunLength, without_times
from tests.helpers.ranks import RankContext, free_port, run_ranks
from tests.helpers.runs import fit, layout, overrides
from tests.helpers.slurm_cluster import Slurm, all_idle, running_slurm
from tests.helpers.slurm_faults.evidence import INTERVAL, NUM_STEPS
from tests.helpers.smoke_mix import mix
from tests.helpers.tiny_shards import write_tiny_shard_set

NODES = ("n1", "n2", "n3")
KILL_WAIT_S = 30
"""SLURM's default: on a busy machine, ranks that are asked to save need more than the tests' seconds."""
SHARED_MEMORY = Path("/dev/shm")
LENGTH = RunLength(NUM_STEPS, saved_at=INTERVAL, warmup_steps=4, decay_steps=8)
RUN = [
    *LENGTH.overrides, f"train.eval_interval={NUM_STEPS}", "train.global_batch_size=4",
    "train.eval_sequences=4", "parallelism.ep=1", *mix(text=0.8, caption=0.2),
]  # fmt: skip
"""Every run's overrides: short, and legal on one node as well as on two."""


class World:
    """What all trials share: the data set and the undisturbed run, made once."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.data = folder / "data"
        self.undisturbed = folder / "undisturbed"

    def build(self) -> None:
        """Write the data and train the undisturbed run, without SLURM."""
        write_tiny_shard_set(self.data)
        arguments = overrides(self.data, self.undisturbed, *layout(dp=2), *RUN)
        run_ranks(_fit_quietly, 2, arguments, str(self.folder), timeout_s=600)

    @property
    def rows(self) -> list[Row]:
        """The undisturbed run's metrics, without times."""
        return without_times(read_rows(self.undisturbed / "metrics.jsonl"))


def _fit_quietly(context: RankContext, arguments: Sequence[str], folder: str) -> None:
    for stream in (1, 2):
        os.dup2(os.open(f"{folder}/undisturbed.log", os.O_CREAT | os.O_APPEND | os.O_WRONLY), stream)
    fit(context, arguments)


class Site:
    """A cluster in a folder, with a temporary folder of its own for everything that runs on it."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.temporary = folder / "tmp"
        self.num_clusters = 0
        self.port = free_port()
        """Of the ranks' rendezvous: nodes of several clusters on one host take each other's ports."""
        self.stack = ExitStack()
        self.sees_shared_memory = own_shared_memory()
        self.cluster = self._start()

    def close(self) -> None:
        """Stop the cluster with everything on it."""
        self.stack.close()

    def _start(self) -> Slurm:
        self.num_clusters += 1
        self.temporary.mkdir(parents=True, exist_ok=True)
        folder = self.folder / f"slurm_{self.num_clusters}"
        cluster = self.stack.enter_context(running_slurm(folder, len(NODES), KILL_WAIT_S))
        cluster.env |= {"TMPDIR": str(self.temporary), "OMP_NUM_THREADS": "1"}
        # Compiled once instead of in every process of every trial.
        cluster.env.pop("PYTHONDONTWRITEBYTECODE", None)
        return cluster

    def renew(self) -> None:
        """Bring back what a trial took away; start another cluster if that does not help."""
        try:
            self.repair()
            self.cluster.wait_until(lambda: all_idle(self.cluster, len(NODES)), 40)
        except (AssertionError, subprocess.TimeoutExpired):
            with suppress(AssertionError, subprocess.TimeoutExpired):
                self.stack.close()
            self.stack = ExitStack()
            self.cluster = self._start()

    def repair(self) -> None:
        """Start daemons that ended, and resume all nodes."""
        cluster = self.cluster
        for name, process in cluster.daemons.items():
            if process.poll() is not None:
                cluster.start(name)
        cluster.wait_until(lambda: cluster.try_to("squeue", "--noheader").returncode == 0, 40)
        for node in NODES:
            # Refused for a node that is sound.
            cluster.try_to("scontrol", "update", f"NodeName={node}", "State=RESUME")

    def end_jobs(self, mark: str) -> None:
        """End all jobs, and processes of which an argument contains this text."""
        jobs = self.cluster.try_to("squeue", "--noheader", "--format=%A").stdout.split()
        if jobs:
            self.cluster.try_to("scancel", *jobs)
        for pid in self.cluster.processes(mark):
            with suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)

    def shared_memory(self) -> set[str]:
        """Names in /dev/shm; none where others use it too."""
        return set(os.listdir(SHARED_MEMORY)) if self.sees_shared_memory else set()


def own_shared_memory() -> bool:
    """Give this process and its children a /dev/shm that no others use; False unless root may do so.

    What is mounted from here on is invisible to others, and gone when the last of them has ended.
    """
    if os.geteuid() != 0:
        return False
    try:
        os.unshare(os.CLONE_NEWNS)
        subprocess.run(["mount", "--make-rprivate", "/"], check=True, capture_output=True)
        command = ["mount", "-t", "tmpfs", "-o", "mode=1777", "tmpfs", str(SHARED_MEMORY)]
        subprocess.run(command, check=True, capture_output=True)
    except (OSError, subprocess.CalledProcessError):
        return False
    return True
