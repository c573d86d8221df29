"""Runs on a real SLURM: submitted, interrupted in every way, and trained as if never interrupted."""

import os
import signal
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.helpers.interrupted_runs import LONG, long_run, rows, without_times
from tests.helpers.ranks import run_ranks
from tests.helpers.runs import fit, layout
from tests.helpers.slurm_cluster import Slurm, running_slurm
from tests.helpers.submitted_run import SubmittedRun

pytestmark = pytest.mark.distributed


@pytest.fixture(scope="module")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Slurm]:
    """A SLURM of two nodes."""
    with running_slurm(tmp_path_factory.mktemp("slurm")) as cluster:
        yield cluster


@pytest.fixture(scope="module")
def uninterrupted(data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of the same run, started without SLURM and left alone."""
    folder = tmp_path_factory.mktemp("uninterrupted")
    run_ranks(fit, 2, long_run(data, folder, *layout(ep=2, dp=2)))
    return folder


def outcomes(run: SubmittedRun) -> list[str | None]:
    """How the attempts ended."""
    return [attempt.outcome for attempt in run.attempts]


def assert_as_if_uninterrupted(run: SubmittedRun, uninterrupted: Path, *more_logs: str) -> None:
    """Check for bitwise equal metrics, a log for each rank of each attempt, and no process left."""
    assert without_times(rows(run.folder)) == without_times(rows(uninterrupted))
    for attempt in run.attempts:
        names = {path.name for path in (run.folder / f"attempts/{attempt.number}").glob("*.log")}
        own_logs = {"srun.log", "node_n1.log", "node_n2.log", "rank_0.log", "rank_1.log"}
        assert names == own_logs | set(more_logs)
    assert os.readlink(run.folder / "attempts/latest") == str(len(run.attempts))
    assert not run.processes()
    assert not (run.folder / "lock.json").exists()
    assert not run.cluster.temporary_files()


def test_a_run_saves_goes_back_to_the_queue_and_on_bitwise(
    cluster: Slurm, data: Path, uninterrupted: Path, tmp_path: Path
) -> None:
    """Its nodes are checked each time. While it holds its folder, no other job gets it, however submitted."""
    run = SubmittedRun(cluster, data, tmp_path / "run", "cluster.slurm.preflight=true")
    again = cluster.try_to(sys.executable, "-m", *run.command)
    assert again.returncode == 2
    assert f"run.dir={run.folder} belongs to job {run.job_id}, which is " in again.stderr
    by_hand = cluster.ask("sbatch", "--parsable", str(run.folder / "submit.sbatch")).strip()
    run.wait_for_step(2)

    cluster.ask("scancel", "--signal=USR1", "--batch", str(run.job_id))
    cluster.wait_until(lambda: run.comment.startswith("k25: goes back to the queue: at step "), 60)
    run.wait_for_attempt(2)
    stopped = run.attempts[0]
    assert run.wait_for_end() == "COMPLETED", run.log
    assert run.comment == f"k25: attempt 2 finished: at step {LONG.num_steps} of {LONG.num_steps}"

    assert stopped.reached is not None and 2 <= stopped.reached < LONG.num_steps
    assert f"SIGUSR1: checkpoint of step {stopped.reached} saved" in run.rank_log(1, 0)
    assert f"resuming after step {stopped.reached} of {LONG.num_steps}" in run.rank_log(2, 0)
    assert outcomes(run) == ["stopped", "finished"]
    cluster.wait_until(lambda: cluster.state(int(by_hand)) == "FAILED", 60)
    assert f"LockedError: run.dir={run.folder} belongs to job {run.job_id}, which is " in run.log
    assert run.log.count("preflight: 2 of 2 nodes passed") == 2
    assert_as_if_uninterrupted(run, uninterrupted, "preflight.log", "preflight_srun.log")


@pytest.mark.slow
def test_a_killed_rank_and_a_killed_step_are_started_again_in_the_same_job(
    cluster: Slurm, data: Path, uninterrupted: Path, tmp_path: Path
) -> None:
    run = SubmittedRun(cluster, data, tmp_path / "run")
    run.wait_for_step(2)
    run.signal_rank(1, signal.SIGKILL)
    run.wait_for_attempt(2)
    run.wait_for_step(LONG.saved_at + 2)
    run.kill_step("n2")
    assert run.wait_for_end() == "COMPLETED", run.log

    assert outcomes(run) == ["failed", "failed", "finished"]
    killed, step_killed, _ = run.attempts
    assert killed.first_to_fail == "n2"
    assert killed.reached is not None and step_killed.reached is not None
    assert f"resuming after step {LONG.saved_at} of {LONG.num_steps}" in run.rank_log(3, 0)
    assert {attempt.job_id for attempt in run.attempts} == {run.job_id}
    assert_as_if_uninterrupted(run, uninterrupted)


@pytest.mark.slow
def test_a_time_limit_costs_no_step(cluster: Slurm, data: Path, uninterrupted: Path, tmp_path: Path) -> None:
    limits = ["cluster.slurm.time_limit_min=2", "cluster.slurm.stop_before_end_s=60"]
    run = SubmittedRun(cluster, data, tmp_path / "run", *limits)
    run.wait_for_step(1)
    run.signal_rank(1, signal.SIGSTOP)
    # SLURM checks time limits every half minute.
    cluster.wait_until(lambda: "SIGUSR1: ranks are asked to save" in run.log, 150, run.folder)
    run.signal_rank(1, signal.SIGCONT)
    run.wait_for_attempt(2)
    stopped = run.attempts[0]
    assert run.wait_for_end() == "COMPLETED", run.log

    # On a busy machine the second job may reach its time limit, too.
    *stops, last = outcomes(run)
    assert set(stops) == {"stopped"} and last == "finished"
    assert f"resuming after step {stopped.reached} of {LONG.num_steps}" in run.rank_log(2, 0)
    assert_as_if_uninterrupted(run, uninterrupted)


@pytest.mark.slow
def test_a_preempted_run_saves_makes_way_and_comes_back(
    cluster: Slurm, data: Path, uninterrupted: Path, tmp_path: Path
) -> None:
    run = SubmittedRun(cluster, data, tmp_path / "run")
    run.wait_for_step(2)
    options = ["--partition=urgent", "--nodes=2", "--exclusive", f"--output={tmp_path}/urgent.log"]
    urgent = int(cluster.ask("sbatch", "--parsable", *options, "--wrap=sleep 3"))
    cluster.wait_until(lambda: cluster.state(urgent) == "COMPLETED", 120, run.folder)
    run.wait_for_attempt(2)
    stopped = run.attempts[0]
    assert run.wait_for_end() == "COMPLETED", run.log

    assert outcomes(run) == ["stopped", "finished"]
    assert f"resuming after step {stopped.reached} of {LONG.num_steps}" in run.rank_log(2, 0)
    assert_as_if_uninterrupted(run, uninterrupted)


@pytest.mark.slow
def test_a_drained_node_is_left_out_and_fewer_replicas_train_the_same(
    cluster: Slurm, data: Path, uninterrupted: Path, tmp_path: Path
) -> None:
    """The signal goes only to the ranks here, as `scancel` sends it without --batch."""
    elastic = ["cluster.slurm.min_nodes=1", "parallelism.ep=1"]
    run = SubmittedRun(cluster, data, tmp_path / "run", *elastic)
    run.wait_for_step(2)
    cluster.ask("scontrol", "update", "NodeName=n2", "State=DRAIN", "Reason=test")
    try:
        cluster.ask("scancel", "--signal=USR1", str(run.job_id))
        run.wait_for_attempt(2)
        assert run.wait_for_end() == "COMPLETED", run.log
    finally:
        cluster.ask("scontrol", "update", "NodeName=n2", "State=RESUME")

    assert outcomes(run) == ["stopped", "finished"]
    assert [attempt.nodes for attempt in run.attempts] == [["n1", "n2"], ["n1"]]
    assert_same_curve(run, uninterrupted)


@pytest.mark.slow
def test_a_lost_node_ends_the_step_and_not_the_job(data: Path, uninterrupted: Path, tmp_path: Path) -> None:
    """First the spare replaces it, then there are fewer replicas."""
    with running_slurm(tmp_path / "slurm", num_nodes=3) as cluster:
        spare = ["cluster.slurm.spare_nodes=1", "cluster.slurm.min_nodes=1", "parallelism.ep=1"]
        run = SubmittedRun(cluster, data, tmp_path / "run", *spare)
        run.wait_for_step(2)
        run.lose_node("n2")
        run.wait_for_attempt(2)
        run.wait_for_step(LONG.saved_at + 1)
        run.lose_node("n3")
        assert run.wait_for_end() == "COMPLETED", run.log

    assert outcomes(run) == ["node_lost", "node_lost", "finished"]
    assert [attempt.nodes for attempt in run.attempts] == [["n1", "n2"], ["n1", "n3"], ["n1"]]
    assert {attempt.job_id for attempt in run.attempts} == {run.job_id}
    assert_same_curve(run, uninterrupted)


SICK_NODE = """#!/bin/sh
# Python on the nodes, of which n2 has almost no shared memory.
[ "$SLURMD_NODENAME" = n2 ] || exec {python} "$@"
exec unshare --mount sh -c 'mount -t tmpfs -o size=16m none /dev/shm && exec {python} "$@"' sh "$@"
"""


@pytest.mark.slow
def test_a_node_that_fails_the_preflight_is_exchanged_for_another(
    data: Path, uninterrupted: Path, tmp_path: Path
) -> None:
    if os.geteuid() != 0:
        pytest.skip("only root can give a node its own /dev/shm")
    python = tmp_path / "python"
    python.write_text(SICK_NODE.format(python=sys.executable))
    python.chmod(0o755)
    with running_slurm(tmp_path / "slurm", num_nodes=3) as cluster:
        checked = ["cluster.slurm.preflight=true", f"cluster.slurm.python={python}"]
        run = SubmittedRun(cluster, data, tmp_path / "run", *checked)
        run.wait_for_attempt(2)
        assert run.wait_for_end() == "COMPLETED", run.log

    assert outcomes(run) == ["unfit", "finished"]
    assert [attempt.nodes for attempt in run.attempts] == [["n1", "n2"], ["n1", "n3"]]
    assert list(run.attempts[0].unfit) == ["n2"]
    assert "/dev/shm: 0.02 GiB" in run.attempts[0].unfit["n2"]
    assert "preflight passed on 2 node(s)" in (run.folder / "attempts/2/preflight.log").read_text()
    assert without_times(rows(run.folder)) == without_times(rows(uninterrupted))
    assert not run.processes()


def assert_same_curve(run: SubmittedRun, uninterrupted: Path) -> None:
    """Check losses and gradient norms against the run of two nodes, up to the order of float32 sums."""
    for row, expected in zip(rows(run.folder), rows(uninterrupted), strict=True):
        assert row["step"] == expected["step"]
        for name in {"loss", "grad_norm", "eval_text_loss"} & expected.keys():
            assert row[name] == pytest.approx(expected[name], rel=1e-5), (row["step"], name)
    assert not run.processes()


@pytest.mark.slow
def test_a_cancelled_run_stays_cancelled(cluster: Slurm, data: Path, tmp_path: Path) -> None:
    run = SubmittedRun(cluster, data, tmp_path / "run")
    run.wait_for_step(2)
    cluster.ask("scancel", str(run.job_id))
    assert run.wait_for_end() == "CANCELLED"
    cluster.wait_until(lambda: not run.processes(), 60)
    assert "goes back to the queue" not in run.log

    cluster.ask("sbatch", str(run.folder / "submit.sbatch"))
    run.wait_for_attempt(2)
    cluster.wait_until(lambda: outcomes(run)[1:] == ["finished"], 120, run.folder)


@pytest.mark.slow
def test_a_run_that_fails_twice_at_the_same_step_is_given_up(
    cluster: Slurm, data: Path, tmp_path: Path
) -> None:
    run = SubmittedRun(cluster, data, tmp_path / "run", "model.vocab_size=8")
    assert run.wait_for_end() == "FAILED"

    assert outcomes(run) == ["failed", "failed"]
    assert "GIVEN UP: attempts 1 and 2 both failed before its first step: this is no accident" in run.log
    assert "model.vocab_size=8: raise it" in run.rank_log(2, 0)
    assert not run.processes()
