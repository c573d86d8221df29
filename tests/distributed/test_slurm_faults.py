"""Seeded disturbances of a running SLURM job, a few of `python -m tests.bench.slurm_faults`."""

import subprocess
import sys

import pytest

from tests.helpers.project_sources import REPO
from tests.helpers.slurm_cluster import require_slurm

pytestmark = [pytest.mark.distributed, pytest.mark.slow]


@pytest.mark.parametrize("kind", ["rank frozen", "node lost", "queued twice"])
def test_a_disturbed_job_recovers(kind: str) -> None:
    """In a process of its own, which may have its own /dev/shm."""
    require_slurm()
    command = [
        sys.executable,
        "-m",
        "tests.bench.slurm_faults",
        "--count",
        "1",
        "--seed",
        "3",
        "--only",
        kind,
    ]
    done = subprocess.run(command, cwd=REPO, capture_output=True, text=True, check=False, timeout=900)
    assert done.returncode == 0, done.stdout + done.stderr
