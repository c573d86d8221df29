"""Two nodes without SLURM: one command on each, whichever starts first."""

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

pytestmark = [pytest.mark.distributed, pytest.mark.slow]


def test_one_command_per_node_trains_as_one_node_does(data: Path, tmp_path: Path) -> None:
    few = ["train.steps=6", "optim.warmup_steps=2", "optim.decay_steps=2"]
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
