"""Nodes without SLURM: one command on each, whichever starts first."""

import contextlib
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from tests.helpers.interrupted_runs import rows, short_run, without_times
from tests.helpers.project_sources import REPO
from tests.helpers.ranks import free_port, run_ranks
from tests.helpers.runs import fit, layout
from tests.helpers.sockets import is_loopback, listening_addresses
from tests.helpers.torchrun_jobs import living, strings

pytestmark = [pytest.mark.distributed, pytest.mark.slow]


def test_one_command_per_node_trains_as_one_node_does(data: Path, tmp_path: Path) -> None:
    few = ["train.steps=6", "optim.warmup=2", "optim.decay=2"]
    run_ranks(fit, 2, short_run(data, tmp_path / "alone", *layout(ep=2, dp=2), *few))
    two_nodes = [*layout(ep=2, dp=2), *few, "cluster.nodes=2", "cluster.gpus_per_node=1"]
    port = free_port()
    command = [sys.executable, "-m", "launch.torchrun", "--first-node", f"127.0.0.1:{port}"]
    arguments = short_run(data, tmp_path / "run", *two_nodes)

    second = subprocess.Popen([*command, "--node", "1", *arguments], cwd=REPO, env=os.environ)
    try:
        # It waits for the first.
        time.sleep(1.0)
        assert second.poll() is None
        subprocess.run([*command, "--node", "0", *arguments], cwd=REPO, check=True, timeout=240)
        assert second.wait(60) == 0
    finally:
        second.send_signal(signal.SIGTERM)
        second.wait()

    assert without_times(rows(tmp_path / "run")) == without_times(rows(tmp_path / "alone"))


def test_a_job_of_one_node_listens_on_loopback_alone(data: Path, tmp_path: Path) -> None:
    arguments = short_run(data, tmp_path / "run", *layout(dp=2))
    mark = f"run.dir={tmp_path / 'run'}"
    found: set[tuple[str, int]] = set()

    job = subprocess.Popen([sys.executable, "-m", "launch.torchrun", *arguments], cwd=REPO, env=os.environ)
    while job.poll() is None:
        for pid in [pid for pid in living() if mark in strings(pid, "cmdline")]:
            with contextlib.suppress(OSError):
                found |= listening_addresses(pid)
        time.sleep(0.1)

    assert job.returncode == 0
    # The store of torchrun, and gloo of both ranks.
    assert len(found) > 2
    assert [one for one in found if not is_loopback(one[0])] == []


def test_nodes_with_other_settings_are_told_on_both(data: Path, tmp_path: Path) -> None:
    """Whose shell has variables of NCCL is no matter: they do not reach the ranks."""
    few = ["train.steps=6", "optim.warmup=2", "optim.decay=2"]
    two_nodes = [*layout(ep=2, dp=2), *few, "cluster.nodes=2", "cluster.gpus_per_node=1"]
    command = [sys.executable, "-m", "launch.torchrun", "--first-node", f"127.0.0.1:{free_port()}"]
    arguments = short_run(data, tmp_path / "run", *two_nodes)
    started = [
        subprocess.Popen(
            [*command, "--node", str(node), *arguments, *more],
            cwd=REPO,
            env=os.environ | {"NCCL_IB_DISABLE": str(node)},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for node, more in enumerate(([], ["optim.lr=6e-3"]))
    ]
    for node, process in enumerate(started):
        printed, _ = process.communicate(timeout=240)
        assert process.returncode != 0
        assert f"node {node} starts on " in printed
        assert "not passed on to the ranks: NCCL_IB_DISABLE of this shell" in printed
        assert "optim.lr: 0.005 on node 0 (host " in printed and "0.006 on node 1 (host " in printed
        assert "environment: has" not in printed
    assert not (tmp_path / "run").exists()
