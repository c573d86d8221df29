"""The supervisor with SLURM's commands as scripts: the preflight before every start."""

import signal
import time

import pytest

from launch import attempt_steps
from launch.attempt_steps import AttemptSteps
from launch.history import Attempt
from tests.helpers.scripted_job import ScriptedJob, send_when


def test_a_preflight_that_ends_well_without_a_report_is_a_failure(job: ScriptedJob) -> None:
    for number in (1, 2):
        (job.folder / f"check_{number}").write_text("exit 0")
    status, supervised = job.supervise(preflight=True)
    assert status == 1 and job.outcomes(supervised) == ["failed", "failed"]
    assert not job.calls("srun")


def test_no_rank_starts_after_a_signal_to_a_preflight_that_passes(job: ScriptedJob) -> None:
    job.then_check()
    ready, check = job.folder / "ready", job.folder / "check_1"
    check.write_text(f"trap '' TERM; touch {ready}; sleep 1\n" + check.read_text())
    send_when(ready, signal.SIGUSR1)
    status, supervised = job.supervise(preflight=True)
    assert status == 0 and job.outcomes(supervised) == ["stopped"]
    assert not job.calls("srun")


def test_nodes_are_checked_before_every_start(job: ScriptedJob) -> None:
    job.then_check()
    job.then("step 5; exit 1")
    job.then_check()
    job.then("step 20")
    status, supervised = job.supervise(preflight=True)
    assert status == 0 and job.outcomes(supervised) == ["failed", "finished"]
    checked = job.calls("checks")
    assert len(checked) == 2
    for option in ("--ntasks=32", "--ntasks-per-node=8", "--kill-on-bad-exit=0", "--overcommit"):
        assert option in checked[0].split()
    attempt = f"{job.run}/attempts/1"
    assert checked[0].endswith(f"python -m launch.preflight_rank {attempt} {job.run} n1,n2,n3,n4 n1 29500")


def test_a_node_that_fails_the_preflight_is_left_out_and_those_left_are_checked(job: ScriptedJob) -> None:
    job.then_check("n2")
    job.then_check()
    job.then("step 20")
    status, supervised = job.supervise(preflight=True, legal_nodes=[2, 3], restart_wait_s=600.0)
    assert status == 0 and job.outcomes(supervised) == ["unfit", "finished"]
    first, second = supervised.attempts.history()
    assert (first.nodes, second.nodes) == (["n1", "n2", "n3"], ["n1", "n3", "n4"])
    assert first.unfit == {"n2": "gpus: 7 GPUs"}
    assert first.first_to_fail is None, "srun's status is the verdict"
    assert first.reason == "preflight failed on n2 (gpus: 7 GPUs)"
    assert len(job.calls("srun")) == 1


def test_a_preflight_that_fails_on_every_node_ends_the_run(
    job: ScriptedJob, capsys: pytest.CaptureFixture[str]
) -> None:
    (job.folder / "others").write_text("n5 idle\nn6 idle\nn7 idle\nn8 idle\n")
    job.then_check("n1", "n2", "n3", "n4")
    status, _ = job.supervise(preflight=True)
    assert status == 1 and not job.calls("srun")
    assert "GIVEN UP: all 4 nodes of attempt 1 failed preflight" in capsys.readouterr().out


def test_a_preflight_without_a_report_is_a_failure(job: ScriptedJob) -> None:
    for _ in range(2):
        job.then_check(status=3)
    status, supervised = job.supervise(preflight=True)
    assert status == 1 and job.outcomes(supervised) == ["failed", "failed"]
    assert not job.calls("srun")
    first = supervised.attempts.history()[0]
    assert first.first_to_fail == "n3"
    assert "srun reported n3 first (Exited with exit code 1); see preflight.log and preflight_srun.log" in (
        first.reason
    )


def test_a_first_node_that_leaves_no_report_is_left_out(job: ScriptedJob) -> None:
    job.then_check(status=3)
    job.then_check()
    job.then("step 20")
    status, supervised = job.supervise(preflight=True, legal_nodes=[3])
    assert status == 0 and job.outcomes(supervised) == ["failed", "finished"]
    nodes = [attempt.nodes for attempt in supervised.attempts.history()]
    assert nodes == [["n1", "n2", "n3"], ["n2", "n3", "n4"]]


@pytest.mark.parametrize("obeys", [True, False])
def test_a_signal_ends_a_preflight(job: ScriptedJob, monkeypatch: pytest.MonkeyPatch, obeys: bool) -> None:
    monkeypatch.setattr(attempt_steps, "STEP_END_S", 0.5)
    ready = job.folder / "ready"
    deaf = "" if obeys else "trap '' TERM;"
    (job.folder / "check_1").write_text(f"{deaf} touch {ready}; while :; do sleep 0.05; done")
    send_when(ready, signal.SIGUSR1)
    status, supervised = job.supervise(preflight=True)
    assert status == 0 and job.outcomes(supervised) == ["stopped"]
    assert "requeue 7" in job.calls("scontrol") and not job.calls("srun")


def test_a_preflight_that_does_not_end_is_ended(job: ScriptedJob, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(attempt_steps, "PREFLIGHT_S", 0.5)
    for number in (1, 2):
        (job.folder / f"check_{number}").write_text("while :; do sleep 0.05; done")
    status, supervised = job.supervise(preflight=True)
    assert status == 1 and job.outcomes(supervised) == ["failed", "failed"]


def test_a_node_that_hangs_holds_nobody_after_the_report(
    job: ScriptedJob, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It does not end, even though the others have named it."""
    monkeypatch.setattr(attempt_steps, "STEP_END_S", 1.0)
    monkeypatch.setattr(attempt_steps, "PREFLIGHT_S", 30.0)
    job.then_check("n2")
    check = job.folder / "check_1"
    check.write_text(check.read_text().replace("exit 0", "while :; do sleep 0.05; done"))
    job.then_check()
    job.then("step 20")
    started_s = time.monotonic()
    status, supervised = job.supervise(preflight=True, legal_nodes=[3])
    assert status == 0 and job.outcomes(supervised) == ["unfit", "finished"]
    assert time.monotonic() - started_s < 30.0


def test_what_the_system_refuses_to_the_supervisor_is_no_nodes_fault(
    job: ScriptedJob, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Such as a process, for a moment: the first node stays, though there is no report."""
    monkeypatch.setattr("launch.step_creation.RETRY_S", 0.01)
    refusals = iter([True])
    real = AttemptSteps.preflight

    def preflight(self: AttemptSteps, attempt: Attempt) -> tuple[dict[str, str], int]:
        if next(refusals, False):
            raise BlockingIOError(11, "Resource temporarily unavailable")
        return real(self, attempt)

    monkeypatch.setattr(AttemptSteps, "preflight", preflight)
    job.then_check()
    job.then("step 20")
    status, supervised = job.supervise(preflight=True)
    assert status == 0 and supervised.unfit == set()
    assert "--nodelist=n1,n2,n3,n4" in job.calls("srun")[0]
