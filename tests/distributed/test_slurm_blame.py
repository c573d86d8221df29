"""Runs on a real SLURM with ranks that are disturbed on one node, which is to blame and left out after
the second time, and with checkpoints that do not load."""

import signal
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from launch.history import Attempt
from tests.helpers.slurm_cluster import Slurm, running_slurm
from tests.helpers.submitted_run import SubmittedRun

pytestmark = [pytest.mark.distributed, pytest.mark.slow]

SPARE = ("cluster.slurm.spare_nodes=1", "train.stall_timeout_s=10", "data.read_timeout_s=3")


@pytest.fixture(scope="module")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Slurm]:
    """A SLURM of three nodes."""
    with running_slurm(tmp_path_factory.mktemp("slurm"), num_nodes=3) as cluster:
        yield cluster


def blamed(attempt: Attempt) -> tuple[str | None, int | None, str]:
    """Node, rank and kind of an attempt's verdict."""
    assert attempt.blame is not None
    return attempt.blame.node, attempt.blame.rank, attempt.blame.kind


@pytest.mark.parametrize(
    ("what", "kind"), [(signal.SIGSTOP, "stopped"), (signal.SIGSEGV, "crashed")], ids=["stop", "crash"]
)
def test_the_node_of_a_disturbed_rank_is_left_out_after_the_second_time(
    cluster: Slurm, data: Path, tmp_path: Path, what: signal.Signals, kind: str
) -> None:
    run = SubmittedRun(cluster, data, tmp_path / "run", *SPARE)
    for attempt, step in ((1, 2), (2, 4)):
        run.wait_for_attempt(attempt)
        run.wait_for_step(step)
        run.signal_rank(1, what)
    assert run.wait_for_end() == "COMPLETED", run.log

    first, second, last = run.attempts
    assert blamed(first) == blamed(second) == ("n2", 1, kind), run.log
    assert [attempt.nodes for attempt in run.attempts] == [["n1", "n2"], ["n1", "n2"], ["n1", "n3"]]
    assert list(last.left_out) == ["n2"] and not second.left_out
    assert "n2 is left out: it was to blame in attempts 1, 2; rank 1 on n2 " in run.log
    assert not run.processes()


LEAVES = """
import os, threading, time

def leave():
    while not os.path.exists({mark!r}):
        time.sleep(0.05)
    os.unlink({mark!r})
    os._exit(0)

if os.environ.get("RANK") == "1" and os.environ.get("SLURMD_NODENAME") == "n2":
    threading.Thread(target=leave, daemon=True).start()
"""
"""sitecustomize of a rank that ends with status 0 as soon as a file is there."""


def test_a_rank_that_ends_with_status_0_in_mid_run_has_failed(
    cluster: Slurm, data: Path, tmp_path: Path
) -> None:
    mark, python = tmp_path / "leave", tmp_path / "python"
    (tmp_path / "site").mkdir()
    (tmp_path / "site/sitecustomize.py").write_text(LEAVES.format(mark=str(mark)))
    python.write_text(f'#!/bin/sh\nPYTHONPATH={tmp_path}/site exec {sys.executable} "$@"\n')
    python.chmod(0o755)
    run = SubmittedRun(cluster, data, tmp_path / "run", *SPARE, f"cluster.slurm.python={python}")
    for attempt, step in ((1, 2), (2, 4)):
        run.wait_for_attempt(attempt)
        run.wait_for_step(step)
        mark.touch()
        cluster.wait_until(lambda: not mark.exists(), 60, run.folder)
    assert run.wait_for_end() == "COMPLETED", run.log

    first, second, last = run.attempts
    assert blamed(first) == blamed(second) == ("n2", 1, "left_early"), run.log
    assert last.nodes == ["n1", "n3"] and "n2 is left out" in run.log


def test_a_checkpoint_that_does_not_load_is_passed_over(cluster: Slurm, data: Path, tmp_path: Path) -> None:
    run = SubmittedRun(cluster, data, tmp_path / "run", "checkpoint.interval=4", "checkpoint.keep=3")
    checkpoints = run.folder / "checkpoints"
    run.wait_for_step(9)
    damaged = next(iter(sorted((checkpoints / "step_8").glob("*.safetensors"))))
    damaged.write_bytes(damaged.read_bytes()[:-1])
    run.signal_rank(0, signal.SIGKILL)
    assert run.wait_for_end() == "COMPLETED", run.log

    killed, unloadable, last = run.attempts
    assert [attempt.outcome for attempt in run.attempts] == ["failed", "failed", "finished"]
    assert blamed(killed) == ("n1", 0, "killed")
    assert blamed(unloadable) == (None, None, "checkpoint") and unloadable.passed_over == "step_8"
    assert "step_8 does not load and is passed over, once, for step_4; it is kept as" in run.log
    assert "resuming after step 4 of 20" in run.rank_log(3, 0)
    assert (checkpoints / "step_8.damaged" / damaged.name).exists() and not last.left_out
    assert [row["step"] for row in run.rows()] == list(range(21))
