"""Steps that SLURM cannot create for the moment are waited for: they are no failures of the run."""

import signal

import pytest

from launch import step_creation
from launch.step_creation import why_not_created
from tests.helpers.scripted_job import ScriptedJob, send_when

AWAY = "srun: error: Unable to create step for job 7: Unable to contact slurm controller (connect failure)"


@pytest.mark.parametrize(
    ("printed", "is_waited_for"),
    [
        (AWAY, True),
        (
            "srun: error: Unable to confirm allocation for job 7: Socket timed out on send/recv operation",
            True,
        ),
        ("srun: fatal: Could not establish a configuration source", True),
        ("srun: error: Munge encode failed: Failed to access x: No such file (Did you start munged?)", True),
        (
            f"srun: Job 7 step creation temporarily disabled, retrying (Requested nodes are busy)\n{AWAY}",
            True,
        ),
        (
            "srun: error: Unable to create step for job 7: Requested node configuration is not available",
            False,
        ),
        ("srun: error: Unable to create step for job 7: Invalid job id specified", False),
        ("srun: error: n2: task 1: Exited with exit code 1", False),
        # The step was there, and munge was away for a moment.
        ("srun: error: Munge encode failed: try again\nsrun: error: n2: task 1: Killed", False),
        ("rank 1: ConnectionError: Connection refused, try again", False),
        ("srun: Job 7 step creation temporarily disabled, retrying (Requested nodes are busy)", False),
        ("", False),
    ],
)
def test_what_keeps_srun_from_creating_a_step(printed: str, is_waited_for: bool) -> None:
    assert bool(why_not_created(printed)) is is_waited_for


@pytest.mark.parametrize("step", ["launch.rendezvous", "launch.node", "launch.preflight_rank"])
def test_a_controller_that_is_away_is_no_failed_attempt(
    job: ScriptedJob, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], step: str
) -> None:
    monkeypatch.setattr(step_creation, "RETRY_S", 0.01)
    tool = job.folder / "bin/srun"
    failing = f"""
case "$*" in *{step}*)
    echo x >> {job.folder}/asked
    if [ "$(wc -l < {job.folder}/asked)" -le 3 ]; then echo '{AWAY}' >&2; exit 1; fi;;
esac"""
    tool.write_text(tool.read_text().replace("#!/bin/sh\n", f"#!/bin/sh\n{failing}\n"))
    job.then_check()
    job.then("step 20")
    status, supervised = job.supervise(preflight=True)
    assert status == 0 and job.outcomes(supervised) == ["finished"]
    assert capsys.readouterr().out.count("that passes; srun is called again") == 3


def test_a_stop_request_ends_the_wait(job: ScriptedJob) -> None:
    ready = job.folder / "ready"
    job.then(f"touch {ready}; echo '{AWAY}' >&2; exit 1")
    send_when(ready, signal.SIGUSR1)
    status, supervised = job.supervise()
    assert status == 0 and job.outcomes(supervised) == ["stopped"]


def test_a_refused_step_is_a_failure(job: ScriptedJob) -> None:
    refused = "srun: error: Unable to create step for job 7: Invalid job id specified"
    job.then(f"echo '{refused}' >&2; exit 1")
    job.then(f"echo '{refused}' >&2; exit 1")
    status, supervised = job.supervise()
    assert status == 1 and job.outcomes(supervised) == ["failed", "failed"]


def test_a_step_that_ended_well_is_not_repeated(job: ScriptedJob) -> None:
    job.then("step 20; echo 'srun: error: Munge encode failed: Socket communication error' >&2")
    status, supervised = job.supervise()
    assert status == 0 and job.outcomes(supervised) == ["finished"]
