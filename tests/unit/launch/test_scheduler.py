"""Queries to SLURM, whose commands are scripts: states, retries and arguments."""

import pytest

from k25_train.run_folder import jobs
from k25_train.run_folder.jobs import SchedulerError, ask, job_state
from launch.scheduler import unusable
from tests.helpers.scripted_job import ScriptedJob


@pytest.mark.parametrize(
    ("state", "is_usable"),
    [
        ("allocated", True), ("mixed-", True), ("idle", True), ("completing", True), ("idle@", True),
        ("allocated*", False), ("down", False), ("down*", False), ("draining", False), ("drained*", False),
        ("failing", False), ("unknown", False), ("idle~", False),
    ],
)  # fmt: skip
def test_states_of_nodes(job: ScriptedJob, state: str, is_usable: bool) -> None:
    job.set_states(n2=state)
    assert unusable(["n1", "n2"]) == ({} if is_usable else {"n2": state})


@pytest.mark.parametrize(
    "words",
    ["Unable to contact slurm controller (connect failure)", "Job is in transitional state, retry later"],
)
def test_a_controller_that_is_away_is_waited_for(
    job: ScriptedJob, monkeypatch: pytest.MonkeyPatch, words: str
) -> None:
    monkeypatch.setattr(jobs, "RETRY_S", 0.01)
    counting = f"""
echo x >> {job.folder}/asked
[ "$(wc -l < {job.folder}/asked)" -gt 2 ] && echo RUNNING && exit 0
echo "squeue: error: {words}" >&2; exit 1"""
    tool = job.folder / "bin/squeue"
    tool.write_text(f"#!/bin/sh\n{counting}\n")
    assert job_state(7, patience_s=60.0) == "RUNNING"


@pytest.mark.parametrize(
    ("words", "expected"),
    [("Invalid job id specified", None), ("slurm_load_jobs error: Access denied", "error")],
)
def test_other_errors_are_not_waited_for(job: ScriptedJob, words: str, expected: str | None) -> None:
    (job.folder / "bin/squeue").write_text(f"#!/bin/sh\necho 'squeue: {words}' >&2; exit 1\n")
    if expected is None:
        assert job_state(7, patience_s=600.0) is None
    else:
        with pytest.raises(SchedulerError, match="Access denied"):
            job_state(7, patience_s=600.0)


def test_what_users_have_slurm_hide_is_seen(job: ScriptedJob, monkeypatch: pytest.MonkeyPatch) -> None:
    (job.folder / "bin/squeue").write_text('#!/bin/sh\necho "${SQUEUE_USERS:-RUNNING}"\n')
    monkeypatch.setenv("SQUEUE_USERS", "somebody")
    assert job_state(7) == "RUNNING"


def test_arguments_reach_slurm_as_they_are(job: ScriptedJob) -> None:
    ask("scontrol", "show", "a b", "$(touch x)")
    assert job.calls("scontrol") == ["show a b $(touch x)"]
