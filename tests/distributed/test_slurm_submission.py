"""Submissions to a real SLURM, and jobs that find their run taken, outdated or finished."""

import os
import re
import signal
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.helpers.interrupted_runs import LONG
from tests.helpers.slurm_cluster import Slurm, running_slurm
from tests.helpers.submitted_run import SubmittedRun

pytestmark = [pytest.mark.distributed, pytest.mark.slow]

KILLING = """#!/bin/sh
# sbatch whose caller is killed, before or after the job is in the queue.
case "$*" in --test-only*) exec {sbatch} "$@";; esac
[ {moment} = before ] && kill -9 "$PPID"
{sbatch} "$@"
[ {moment} = after ] && kill -9 "$PPID"
"""
ANSWER_LOST = """#!/bin/sh
# sbatch that queues the job, though its answer does not arrive.
case "$*" in --test-only*) exec {sbatch} "$@";; esac
{sbatch} "$@" > /dev/null
echo "sbatch: error: Batch job submission failed: Zero Bytes were transmitted or received" >&2
exit 1
"""


@pytest.fixture(scope="module")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Slurm]:
    """A SLURM of three nodes."""
    with running_slurm(tmp_path_factory.mktemp("slurm"), num_nodes=3) as cluster:
        yield cluster


@pytest.fixture(autouse=True)
def no_jobs(cluster: Slurm) -> Iterator[None]:
    """Tests leave no job."""
    yield
    cluster.try_to("scancel", "--user=" + cluster.ask("id", "-u").strip())
    cluster.wait_until(lambda: not cluster.ask("squeue", "--noheader").strip(), 60)


def num_nodes(run: SubmittedRun) -> int:
    """How many nodes the job has."""
    return int(run.cluster.ask("squeue", "--noheader", f"--jobs={run.job_id}", "--format=%D"))


def test_spares_come_back_and_a_finished_run_starts_no_ranks(
    cluster: Slurm, data: Path, tmp_path: Path
) -> None:
    run = SubmittedRun(cluster, data, tmp_path / "run", "cluster.slurm.spare_nodes=1")
    run.wait_for_step(2)
    assert num_nodes(run) == 3
    cluster.ask("scancel", "--signal=USR1", "--batch", str(run.job_id))
    run.wait_for_attempt(2)
    assert num_nodes(run) == 3, run.log
    assert run.wait_for_end() == "COMPLETED", run.log
    assert [attempt.outcome for attempt in run.attempts] == ["stopped", "finished"]
    assert not (run.folder / "lock.json").exists()

    # What is submitted by hand after the end: an array, several at once, and one that waits for another.
    script = str(run.folder / "submit.sbatch")
    array = cluster.ask("sbatch", "--parsable", "--array=1-3", script).strip()
    later = cluster.ask("sbatch", "--parsable", f"--dependency=afterany:{array}", script).strip()
    cluster.wait_until(lambda: cluster.state(int(later)) == "COMPLETED", 120, run.folder)
    assert run.log.count(f"FINISHED: step {LONG.num_steps} of {LONG.num_steps} is done; nothing to do") == 4
    assert len(run.attempts) == 2
    assert not (run.folder / "lock.json").exists()
    again = cluster.try_to(sys.executable, "-m", *run.command)
    assert again.returncode == 2 and "is done; nothing to do: raise train.steps" in again.stderr


def test_of_jobs_that_continue_at_once_one_trains(cluster: Slurm, data: Path, tmp_path: Path) -> None:
    """Each finds out when it starts; one that is cancelled leaves no lock."""
    run = SubmittedRun(cluster, data, tmp_path / "run", "cluster.nodes=1", "parallelism.ep=1")
    run.wait_for_step(1)
    cluster.ask("scancel", "--full", str(run.job_id))
    assert run.wait_for_end() == "CANCELLED"
    cluster.wait_until(lambda: not run.processes(), 60)
    cluster.wait_until(lambda: not (run.folder / "lock.json").exists(), 30, run.folder)
    script = str(run.folder / "submit.sbatch")
    jobs = [int(cluster.ask("sbatch", "--parsable", script)) for _ in range(3)]
    cluster.wait_until(
        lambda: all(cluster.state(job) in ("COMPLETED", "FAILED") for job in jobs), 240, run.folder
    )
    states = [cluster.state(job) for job in jobs]
    assert sorted(states) == ["COMPLETED", "FAILED", "FAILED"]
    winner = jobs[states.index("COMPLETED")]
    refused = rf"LockedError: run\.dir={run.folder} belongs to job {winner}, which is RUNNING"
    assert len(re.findall(refused, run.log)) == 2
    assert [attempt.job_id for attempt in run.attempts[1:]] == [winner]


@pytest.mark.parametrize("moment", ["before", "after"])
def test_a_submission_that_is_killed_leaves_no_job(
    cluster: Slurm, data: Path, tmp_path: Path, moment: str
) -> None:
    run = SubmittedRun(cluster, data, tmp_path / "run")
    cluster.ask("scancel", str(run.job_id))
    assert run.wait_for_end() == "CANCELLED"
    before = {path.name: path.read_bytes() for path in run.folder.glob("submit.*")}
    again = submit_with(cluster, run, tmp_path, KILLING.replace("{moment}", moment), "train.seed=7")
    assert again < 0
    cluster.wait_until(lambda: not cluster.ask("squeue", "--noheader").strip(), 60, run.folder)
    cluster.wait_until(lambda: not (run.folder / "lock.json").exists(), 60, run.folder)
    assert {path.name: path.read_bytes() for path in run.folder.glob("submit.*")} == before


def test_a_job_whose_answer_is_lost_trains(cluster: Slurm, data: Path, tmp_path: Path) -> None:
    run = SubmittedRun(cluster, data, tmp_path / "run")
    cluster.ask("scancel", str(run.job_id))
    assert run.wait_for_end() == "CANCELLED"
    assert submit_with(cluster, run, tmp_path, ANSWER_LOST, "optim.lr=5e-3") == 0
    (job,) = cluster.ask("squeue", "--noheader", "--format=%A").split()
    run.job_id = int(job)
    run.wait_for_step(1)
    assert run.attempts[-1].job_id == int(job)


def test_a_controller_that_is_away_delays_a_submission(cluster: Slurm, data: Path, tmp_path: Path) -> None:
    """It is stopped for a while, as if its machine hung."""
    (controller,) = [pid for pid in cluster.processes("slurmctld") if is_own(cluster, pid)]
    os.kill(controller, signal.SIGSTOP)
    threading.Timer(25.0, os.kill, (controller, signal.SIGCONT)).start()
    start_s = time.monotonic()
    run = SubmittedRun(cluster, data, tmp_path / "run")
    assert run.job_id and time.monotonic() - start_s > 1.0


def is_own(cluster: Slurm, pid: int) -> bool:
    """Whether a process is of this cluster."""
    environ = Path(f"/proc/{pid}/environ").read_bytes()
    return f"SLURM_CONF={cluster.env['SLURM_CONF']}".encode() in environ.split(b"\0")


def submit_with(cluster: Slurm, run: SubmittedRun, folder: Path, sbatch: str, *overrides: str) -> int:
    """Submit the run again, with another sbatch; the exit status."""
    real = cluster.ask("sh", "-c", "command -v sbatch").strip()
    path = folder / "bin/sbatch"
    path.parent.mkdir()
    path.write_text(sbatch.replace("{sbatch}", real))
    path.chmod(0o755)
    env = cluster.env
    cluster.env = env | {"PATH": f"{folder}/bin:{env['PATH']}"}
    try:
        return cluster.try_to(sys.executable, "-m", *run.command, *overrides).returncode
    finally:
        cluster.env = env
