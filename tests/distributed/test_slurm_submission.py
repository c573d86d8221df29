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

from k25_train.compose.resolve import compose
from k25_train.errors import ConfigError
from launch import slurm
from launch.feasibility import with_absolute_paths
from tests.helpers.project_sources import REPO
from tests.helpers.slurm_cluster import Slurm, running_slurm
from tests.helpers.submitted_run import END_S, SubmittedRun

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


REQUEUED_ONCE = """#!/bin/bash
# A job that asks for nodes as a supervisor does, and goes back to the queue once as a supervisor does.
echo "$SLURM_JOB_NUM_NODES nodes" >> {folder}/nodes
cd {repo}
[ -n "$SLURM_RESTART_COUNT" ] || exec {python} -c "
from pathlib import Path
from dataclasses import replace
from launch.requeueing import Job
from tests.helpers.scripted_queue import a_submission
submission = replace(a_submission(Path('{folder}')), legal_nodes=[1, 2], spare_nodes=1)
Job(submission, $SLURM_JOB_ID, {nodes}, 'main').requeue('test', {unfit})"
"""


@pytest.mark.parametrize(
    ("options", "unfit", "expected"),
    [
        ([], [], [3, 3]),
        (["--mincpus=1"], [], [3, 3]),
        ([], ["n3"], [3, 2]),
        ([], ["n2", "n3"], [3, 1]),
    ],
)
def test_spares_come_back_after_a_requeue(
    cluster: Slurm, tmp_path: Path, options: list[str], unfit: list[str], expected: list[int]
) -> None:
    nodes = ["n1", "n2", "n3"]
    text = REQUEUED_ONCE.format(folder=tmp_path, repo=REPO, python=sys.executable, nodes=nodes, unfit=unfit)
    script = tmp_path / "script"
    script.write_text(text)
    fixed = ["--nodes=2-3", "--requeue", "--no-kill", "--exclusive", f"--output={tmp_path}/log"]
    job_id = int(cluster.ask("sbatch", "--parsable", *fixed, *options, str(script)))
    cluster.wait_until(lambda: cluster.state(job_id) == "COMPLETED", END_S, tmp_path)
    assert [int(line.split()[0]) for line in (tmp_path / "nodes").read_text().splitlines()] == expected


def test_jobs_of_a_finished_run_start_no_ranks(
    cluster: Slurm, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of an array, several at once, and one that waits for another."""
    for name, value in cluster.env.items():
        monkeypatch.setenv(name, value)
    (tmp_path / "data").mkdir()
    (tmp_path / "data/dataset.json").touch()
    run = tmp_path / "run"
    one_rank = ["cluster.nodes=1", "cluster.gpus_per_node=1", "parallelism=serial"]
    given = ["experiment=smoke", "cluster=local_slurm", *one_rank, f"data.dir={tmp_path}/data"]
    config = with_absolute_paths(compose([*given, f"run.dir={run}"]))
    (run / f"checkpoints/step_{config.train.steps}").mkdir(parents=True)
    with pytest.raises(ConfigError, match=r"is done; nothing to do: raise train\.steps"):
        slurm.submit(config, *slurm.prepare(config, 3))
    (run / f"checkpoints/step_{config.train.steps}").rename(run / "away")
    # Held, so that the last step can be done before it starts.
    cluster.ask("scontrol", "update", "PartitionName=main", "State=DOWN")
    slurm.submit(config, *slurm.prepare(config, 3))
    (run / "away").rename(run / f"checkpoints/step_{config.train.steps}")
    script = str(run / "submit.sbatch")
    array = cluster.ask("sbatch", "--parsable", "--array=1-3", script).strip()
    later = int(cluster.ask("sbatch", "--parsable", f"--dependency=afterany:{array}", script))
    cluster.ask("scontrol", "update", "PartitionName=main", "State=UP")
    cluster.wait_until(lambda: cluster.state(later) in ("COMPLETED", "FAILED"), END_S, run)
    log = (run / "supervisor.log").read_text()
    refused = len(re.findall(r"LockedError: run\.dir=\S+ belongs to job \d+, which is", log))
    finished = log.count(
        f"FINISHED: step {config.train.steps} of {config.train.steps} is done; nothing to do"
    )
    assert refused + finished == 5 and finished >= 1, log
    assert not (run / "attempts").exists() and not (run / "lock.json").exists()


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
