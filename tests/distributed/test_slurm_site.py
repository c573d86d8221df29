"""A run on a real SLURM whose cluster file says what its site has: set-up, variables, secrets, shares."""

import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.helpers.slurm_cluster import Slurm, running_slurm
from tests.helpers.submitted_run import SubmittedRun

pytestmark = [pytest.mark.distributed, pytest.mark.slow]

MODULES = """
# Reads a variable that is not set, and one of its commands fails.
[ "$NOT_SET" = yes ]
module() { export MODULE=$2 PATH="$TOOLS:$PATH"; }
"""
PYTHON = """#!/bin/sh
# Found by a name that only the site's module puts on PATH; notes what it was given, of a secret the length.
given="$MODULE $SITE_FLAG ${{#MY_TOKEN}}"
echo "$SLURMD_NODENAME $SLURM_STEP_ID $given" >> "$TOOLS/notes"
exec {python} "$@"
"""
SECRET = "correct horse"


@pytest.fixture(scope="module")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Slurm]:
    """A SLURM of two nodes."""
    with running_slurm(tmp_path_factory.mktemp("slurm")) as cluster:
        yield cluster


def write_site(tools: Path) -> list[str]:
    """A site's files in a new folder; returns the lines that set it up."""
    tools.mkdir()
    (tools / "modules.sh").write_text(MODULES)
    python = tools / "site-python"
    python.write_text(PYTHON.format(python=sys.executable))
    python.chmod(0o755)
    (tools / "secret").write_text(f"{SECRET}\n")
    (tools / "secret").chmod(0o600)
    return [f"export TOOLS={tools}", f"source {tools}/modules.sh", "module load k25"]


def test_a_site_is_set_up_on_every_node_and_its_secret_is_in_no_file(
    cluster: Slurm, data: Path, tmp_path: Path
) -> None:
    tools = tmp_path / "tools"
    setup = write_site(tools)
    run = SubmittedRun(
        cluster, data, tmp_path / "run",
        f"cluster.slurm.setup=[{', '.join(map(repr, setup))}]", "cluster.slurm.python=site-python",
        "cluster.slurm.exclusive=false", "cluster.slurm.mem=null", "cluster.slurm.cpus_per_task=1",
        "cluster.slurm.mpi=none", "cluster.slurm.comment='a trial, of one site'", "cluster.slurm.nice=5",
        "cluster.slurm.sbatch=['--mail-type=NONE']", f"cluster.secrets={{MY_TOKEN: {tools}/secret}}",
        "cluster.environment={SITE_FLAG: {value: 7, reason: 'seen by every rank of the site'}}",
    )  # fmt: skip
    shown = cluster.ask("scontrol", "show", "job", str(run.job_id))
    assert "Comment=a trial, of one site" in shown and "Nice=5" in shown
    run.wait_for_step(2)
    cluster.ask("scancel", "--signal=USR1", "--batch", str(run.job_id))
    run.wait_for_attempt(2)
    assert run.wait_for_end() == "COMPLETED", run.log

    assert [attempt.outcome for attempt in run.attempts] == ["stopped", "finished"]
    # The batch host and both nodes were set up, before and after the requeue.
    notes = [line.split(" ", 2) for line in (tools / "notes").read_text().splitlines()]
    assert {given for _, _, given in notes} == {f"k25 7 {len(SECRET)}"}
    assert {node for node, _, _ in notes} == {"n1", "n2"}
    for path in run.folder.rglob("*"):
        assert not path.is_file() or SECRET.encode() not in path.read_bytes(), path


def test_a_line_that_fails_on_one_node_is_told(cluster: Slurm, data: Path, tmp_path: Path) -> None:
    """There, the run cannot start, and says which line of the cluster's file it was."""
    line = '[ "$SLURMD_NODENAME" != n2 ]'
    run = SubmittedRun(cluster, data, tmp_path / "run", f"cluster.slurm.setup=['{line}']")
    assert run.wait_for_end() == "FAILED", run.log
    told = (run.folder / "attempts/1/srun.log").read_text()
    assert f"cluster.slurm.setup.0 failed: {line}" in told
    assert run.attempts[0].first_to_fail == "n2"
