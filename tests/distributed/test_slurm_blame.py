"""Runs on a real SLURM with ranks that are disturbed on one node, which is to blame and left out after
the second time, and with checkpoints that do not load."""

import signal
from collections.abc import Iterator
from pathlib import Path

import pytest

from launch.history import Attempt
from tests.helpers.slurm_cluster import Slurm, running_slurm
from tests.helpers.submitted_run import SubmittedRun

pytestmark = [pytest.mark.distributed, pytest.mark.slow]

SPARE = ("cluster.slurm.spare_nodes=1", "train.stall_timeout_s=10")


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
