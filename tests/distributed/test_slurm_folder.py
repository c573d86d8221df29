"""A run folder that fills up, and ranks that flood their logs, on a real SLURM; what status says of it."""

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.helpers.interrupted_runs import LONG
from tests.helpers.slurm_cluster import Slurm, running_slurm
from tests.helpers.submitted_run import SubmittedRun

pytestmark = [pytest.mark.distributed, pytest.mark.slow]

FLOOD = """
import os, sys
if "launch.rank" in sys.orig_argv:
    import threading, time
    def flood():
        while b"rank_" not in os.readlink(b"/proc/self/fd/1"):
            time.sleep(0.01)
        for number in range(300_000):
            os.write(1, b"flood %099d\\n" % number)
    threading.Thread(target=flood, daemon=True).start()
"""
"""33 MB from each rank, as soon as it has its log; the name of the module has every Python run it."""


@pytest.fixture(scope="module")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Slurm]:
    """A SLURM of two nodes."""
    with running_slurm(tmp_path_factory.mktemp("slurm")) as cluster:
        yield cluster


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of 256 MiB."""
    if os.geteuid() != 0:
        pytest.skip("only root can mount a file system")
    folder = tmp_path / "disk"
    folder.mkdir()
    mounted = ["mount", "-t", "tmpfs", "-o", "size=256m", "none", str(folder)]
    if subprocess.run(mounted, check=False).returncode:
        pytest.skip("this machine lets nobody mount a file system")
    yield folder
    subprocess.run(["umount", "--lazy", str(folder)], check=True)


def status(cluster: Slurm, run: Path) -> dict[str, Any]:
    """What k25-status says of a run."""
    (found,) = json.loads(cluster.ask(sys.executable, "-m", "launch.status", "--json", str(run)))["runs"]
    assert isinstance(found, dict)
    return found


def test_a_disk_that_is_full_for_a_while_costs_the_steps_since_the_last_checkpoint(
    cluster: Slurm, data: Path, small_disk: Path
) -> None:
    run = SubmittedRun(cluster, data, small_disk / "run")
    run.wait_for_step(LONG.saved_at + 1)
    assert status(cluster, run.folder)["checkpoints"]["newest_step"] == LONG.saved_at
    # Somebody else fills the disk before the last checkpoint, but for what small files need.
    filler = small_disk / "filler"
    with filler.open("wb") as file:
        os.posix_fallocate(file.fileno(), 0, shutil.disk_usage(small_disk).free - (1 << 20))

    cluster.wait_until(lambda: "k25: waiting for the run folder" in run.comment, 240, run.folder)
    told = status(cluster, run.folder)
    assert (told["state"], told["attempts"][0]["outcome"]) == ("between attempts", "no_room")
    assert "bytes are free, a checkpoint takes" in told["why"]
    assert any("could not be written" in line for line in told["blamed_log"]["lines"])
    assert not list((run.folder / "checkpoints").glob("*.partial"))
    filler.unlink()
    assert run.wait_for_end() == "COMPLETED", run.log

    assert [attempt.outcome for attempt in run.attempts] == ["no_room", "finished"]
    assert [row["step"] for row in run.rows()] == list(range(LONG.num_steps + 1))
    assert "works again after" in run.log and not run.processes() and not cluster.temporary_files()
    assert status(cluster, run.folder)["state"] == "finished"


def test_a_disk_without_a_byte_free_does_not_end_the_supervisor(
    cluster: Slurm, data: Path, small_disk: Path
) -> None:
    """Neither its own log nor the record of the attempt can be written meanwhile; both are, afterwards."""
    run = SubmittedRun(cluster, data, small_disk / "run")
    run.wait_for_step(LONG.saved_at + 1)
    filler = small_disk / "filler"
    with filler.open("wb") as file, pytest.raises(OSError, match="No space left"):
        while True:
            os.write(file.fileno(), bytes(1 << 16))

    cluster.wait_until(lambda: "k25: waiting for the run folder" in run.comment, 240, run.folder)
    assert run.state == "RUNNING"
    filler.unlink()
    assert run.wait_for_end() == "COMPLETED", run.log

    assert [attempt.outcome for attempt in run.attempts] == ["no_room", "finished"]
    assert "waiting for the run folder" in run.log and "attempt 1 no_room: " in run.log


def test_a_flood_is_cut_and_its_beginning_stays(cluster: Slurm, data: Path, tmp_path: Path) -> None:
    (tmp_path / "sitecustomize.py").write_text(FLOOD)
    env, cluster.env = cluster.env, cluster.env | {"PYTHONPATH": str(tmp_path)}
    try:
        run = SubmittedRun(cluster, data, tmp_path / "run", "--max-log-mib=1")
        assert run.wait_for_end() == "COMPLETED", run.log
    finally:
        cluster.env = env

    for rank in range(2):
        logs = [run.folder / f"attempts/1/rank_{rank}.log{suffix}" for suffix in ("", ".previous", ".first")]
        assert sum(log.stat().st_size for log in logs if log.exists()) < 6 << 20
        assert "flood 0" in logs[-1].read_text()
    assert run.rows()[-1]["step"] == LONG.num_steps
    assert not cluster.temporary_files()
