"""torchrun as a child: signals go past it to its ranks, and nothing outlives the parent."""

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from launch.forwarding import children
from tests.helpers.project_sources import REPO

RANK = """
import os, signal, sys, time
def stop(number, frame):
    open(sys.argv[1] + f".{number}", "w").close()
    os._exit(0)
for number in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1):
    signal.signal(number, stop)
open(sys.argv[1] + ".ready", "w").close()
time.sleep(60)
"""
TORCHRUN = """
import subprocess, sys
ranks = [subprocess.Popen([sys.executable, "-c", sys.argv[1], f"{sys.argv[2]}/{rank}"]) for rank in range(2)]
sys.exit(sum(rank.wait() for rank in ranks))
"""
PARENT = """
import os, sys
from launch.forwarding import run_forwarding
sys.exit(run_forwarding(sys.argv[1:], os.environ))
"""


def start(folder: Path, *command: str) -> subprocess.Popen[bytes]:
    """What stands in for torchrun, below its parent."""
    child = command or (sys.executable, "-c", TORCHRUN, RANK, str(folder))
    return subprocess.Popen([sys.executable, "-c", PARENT, *child], cwd=REPO)


def wait_until(happened: Callable[[], bool]) -> None:
    """Return as soon as it has."""
    deadline = time.monotonic() + 30
    while not happened():
        assert time.monotonic() < deadline
        time.sleep(0.02)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGUSR1])
def test_signals_reach_the_ranks_and_they_decide_how_it_ends(tmp_path: Path, number: signal.Signals) -> None:
    parent = start(tmp_path)
    wait_until(lambda: len(list(tmp_path.glob("*.ready"))) == 2)
    parent.send_signal(number)
    assert parent.wait(30) == 0
    assert {path.name for path in tmp_path.glob(f"*.{number}")} == {f"0.{number:d}", f"1.{number:d}"}


def test_a_killed_parent_takes_torchrun_with_it(tmp_path: Path) -> None:
    parent = start(tmp_path)
    wait_until(lambda: len(list(tmp_path.glob("*.ready"))) == 2)
    (torchrun,) = children(parent.pid)
    ranks = children(torchrun)
    parent.kill()
    parent.wait()
    wait_until(lambda: not Path(f"/proc/{torchrun}").exists())
    # Real ranks ask the kernel for a signal when torchrun is gone.
    for rank in ranks:
        os.kill(rank, signal.SIGKILL)


@pytest.mark.parametrize(
    ("code", "status"), [("raise SystemExit(7)", 7), ("import os; os.kill(os.getpid(), 9)", 137)]
)
def test_the_status_is_torchruns(tmp_path: Path, code: str, status: int) -> None:
    assert start(tmp_path, sys.executable, "-c", code).wait(30) == status
