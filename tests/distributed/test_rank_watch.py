"""Ranks under torchrun, one of which ends: what its watch of them notes."""

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from launch.blame.evidence import LEFT_EARLY
from launch.ends import lines_in
from tests.helpers.project_sources import REPO

pytestmark = pytest.mark.distributed

RANK = """
import os, signal, sys, time
from k25_train.entry import run_command
from k25_train.errors import DataError

def body():
    if os.environ["RANK"] != "1":
        time.sleep(600)
    if {how!r} == "leave":
        sys.exit(0)
    if {how!r} == "error":
        raise DataError("shard_7 is damaged") from OSError(5, "Input/output error", "/d/shard_7")
    os.kill(os.getpid(), signal.SIGKILL)

run_command(body)
"""


@pytest.mark.parametrize(
    ("how", "status"),
    [
        ("leave", LEFT_EARLY),
        pytest.param("error", 2, marks=pytest.mark.slow),
        pytest.param("kill", -9, marks=pytest.mark.slow),
    ],
)
def test_torchrun_notes_who_ended_first_and_how(tmp_path: Path, how: str, status: int) -> None:
    script, log = tmp_path / "rank.py", tmp_path / "ends_n1.jsonl"
    script.write_text(RANK.format(how=how))
    command = [
        sys.executable, "-m", "launch.agent", f"--ends={log}", "--nnodes=1", "--nproc-per-node=2",
        "--master-addr=127.0.0.1", "--master-port=0", str(script),
    ]  # fmt: skip
    done = subprocess.run(
        command, cwd=REPO, env=os.environ | {"PYTHONPATH": str(REPO), "OMP_NUM_THREADS": "1"},
        capture_output=True, text=True, check=False, timeout=120,
    )  # fmt: skip
    assert done.returncode == 1, done.stderr
    begin, first, second, kernel = (line for _, line in lines_in(tmp_path))
    assert "127.0.0.1" in begin["addresses"] and kernel["event"] == "kernel"
    assert (first["rank"], first["status"], first["is_closing"]) == (1, status, False)
    assert (second["rank"], second["status"], second["is_closing"]) == (0, -signal.SIGTERM, True)
    said = first["error"] or {}
    assert (said.get("kind"), said.get("code"), said.get("path")) == (
        ("DataError", "EIO", "/d/shard_7") if how == "error" else (None, None, None)
    )
    assert (f"with status {LEFT_EARLY}: it ended with status 0 before" in done.stderr) == (how == "leave")


@pytest.mark.slow
def test_a_preflight_that_passes_is_done(tmp_path: Path) -> None:
    """It leaves without tearing down, with status 0."""
    command = [
        sys.executable, "-m", "launch.torchrun", "--preflight", "experiment=smoke", "parallelism=serial",
        "cluster.gpus_per_node=1", f"run.dir={tmp_path}",
    ]  # fmt: skip
    done = subprocess.run(
        command, cwd=REPO, env=os.environ | {"OMP_NUM_THREADS": "1"}, capture_output=True, text=True,
        check=False, timeout=400,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
