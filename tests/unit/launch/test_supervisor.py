"""The supervisor with SLURM's commands as scripts: which attempts it makes, and when it gives up."""

import json
import signal
import sys
from pathlib import Path

import pytest

from launch import attempt_steps
from launch.history import Outcome
from launch.submission import Submission
from launch.supervisor import Supervisor
from tests.helpers.scripted_job import ScriptedJob, send_when


def test_ranks_start_once_on_all_nodes_and_finish(job: ScriptedJob) -> None:
    job.then("step 20")
    status, supervised = job.supervise()
    assert status == 0 and job.outcomes(supervised) == ["finished"]
    (call,) = job.calls("srun")
    for option in (
        "--nodes=4", "--ntasks=4", "--nodelist=n1,n2,n3,n4", "--kill-on-bad-exit=1", "--no-kill=off",
        "--overlap", "--export=ALL",
    ):  # fmt: skip
        assert option in call.split()
    assert call.endswith(f"python -m launch.node {job.run} 1 4 n1 29500")
    assert not job.calls("scontrol")


def test_checks_and_ranks_run_in_the_container(job: ScriptedJob) -> None:
    job.then_check()
    job.then("step 20")
    job.supervise(preflight=True, interface="bond0", container=["--container-image=k25.sqsh"])
    inside = "--container-image=k25.sqsh python -m launch."
    asked = job.calls("rendezvous")
    assert len(asked) == 2
    # Before any image is there.
    assert all(call.endswith(f"{sys.executable} -m launch.rendezvous 29500 bond0 ipv4") for call in asked)
    assert not any("--container" in call for call in asked)
    assert f"{inside}preflight_rank " in job.calls("checks")[0] and f"{inside}node " in job.calls("srun")[0]


def test_a_failure_is_tried_again_in_the_same_job(job: ScriptedJob) -> None:
    job.then("step 5; echo 'srun: error: n2: task 1: Killed' >&2; exit 137")
    job.then("step 20")
    status, supervised = job.supervise()
    assert status == 0 and job.outcomes(supervised) == ["failed", "finished"]
    first = supervised.attempts.history()[0]
    assert (first.reached, first.first_to_fail) == (5, "n2")


def test_two_failures_at_a_step_end_the_run(job: ScriptedJob, capsys: pytest.CaptureFixture[str]) -> None:
    for _ in range(2):
        job.then("step 5; exit 1")
    status, _ = job.supervise(restart_wait_s=0.0)
    assert status == 1 and len(job.calls("srun")) == 2
    printed = capsys.readouterr().out
    assert "GIVEN UP: attempts 1 and 2 both failed after step 5" in printed
    assert f"when their cause is fixed: sbatch {job.run}/submit.sbatch" in printed


def test_attempts_that_only_skip_steps_end_the_run(
    job: ScriptedJob, capsys: pytest.CaptureFixture[str]
) -> None:
    """Each gets further than the one before, by steps that change nothing."""
    for attempt in range(50):
        rows = [f'{{"step": {11 * attempt + n + 3}, "loss": 9.0, "grad_norm": null}}' for n in range(11)]
        job.then(
            "step 2\n" + "\n".join(f"echo '{row}' >> {job.run}/metrics.jsonl" for row in rows) + "\nexit 1"
        )
    status, supervised = job.supervise(restart_wait_s=0.0)
    assert status == 1
    assert [attempt.reached for attempt in supervised.attempts.history()] == [2, 2]
    assert "both failed after step 2 (attempt 2 then skipped 11 steps" in capsys.readouterr().out


def test_a_lost_node_is_replaced_by_a_spare_then_replicas_are_fewer(job: ScriptedJob) -> None:
    states = f"cat > {job.folder}/states"
    job.then(f"step 3; printf 'n1 allocated\\nn2 down*\\nn3 mixed-\\nn4 idle\\n' | {states}; exit 1")
    job.then(f"step 6; printf 'n1 draining\\nn2 down*\\nn3 mixed-\\nn4 idle\\n' | {states}; exit 1")
    job.then("step 20")
    status, supervised = job.supervise(legal_nodes=[2, 3])
    assert status == 0 and job.outcomes(supervised) == ["node_lost", "node_lost", "finished"]
    nodes = [attempt.nodes for attempt in supervised.attempts.history()]
    assert nodes == [["n1", "n2", "n3"], ["n1", "n3", "n4"], ["n3", "n4"]]
    assert "n2 is down*" in supervised.attempts.history()[0].reason


def test_a_lost_node_that_comes_back_is_no_longer_the_jobs(job: ScriptedJob) -> None:
    """SLURM has taken it from the job, so no step starts on it, however idle it is."""
    take = f"echo 'RUNNING n1,n3,n4' > {job.folder}/state"
    job.then(f"step 3; {take}; echo 'srun: error: Node failure on n2' >&2; exit 1")
    job.then("step 20")
    status, supervised = job.supervise(legal_nodes=[3])
    assert status == 0 and job.outcomes(supervised) == ["node_lost", "finished"]
    first, second = supervised.attempts.history()
    assert (first.nodes, second.nodes) == (["n1", "n2", "n3"], ["n1", "n3", "n4"])
    assert "n2 is no longer the job's" in first.reason


def test_srun_that_waits_for_a_lost_node_is_ended(job: ScriptedJob, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(attempt_steps, "STEP_END_S", 0.5)
    job.then("step 3; echo 'srun: error: n1: task 0: Exited with exit code 1' >&2; sleep 20")
    job.then("step 20")
    status, supervised = job.supervise()
    assert status == 0 and job.outcomes(supervised) == ["failed", "finished"]


def test_what_a_node_prints_need_not_be_text(job: ScriptedJob) -> None:
    """Ranks would go on unwatched along with those of the next attempt."""
    job.then("printf 'caf\\351\\n' >&2; sleep 1.2; step 20")
    status, supervised = job.supervise()
    assert status == 0 and job.outcomes(supervised) == ["finished"]


def test_a_log_that_cannot_be_read_ends_nothing(job: ScriptedJob) -> None:
    job.then(f"rm {job.run}/attempts/1/srun.log; sleep 1.2; step 20")
    status, supervised = job.supervise()
    assert status == 0 and job.outcomes(supervised) == ["finished"]


def test_a_signal_ends_the_search_for_a_rendezvous(job: ScriptedJob) -> None:
    ready = job.folder / "ready"
    late = job.folder / "late"
    hanging = f"touch {ready}; sleep 4 >/dev/null 2>&1; touch {late}"
    (job.folder / "bin/srun").write_text(f"#!/bin/sh\n{hanging}\n")
    send_when(ready, signal.SIGUSR1)
    status, supervised = job.supervise()
    assert status == 0 and job.outcomes(supervised) == ["stopped"]
    assert not late.exists()


def test_an_attempt_whose_supervisor_was_lost_counts(job: ScriptedJob) -> None:
    job.then("step 20")
    lost = Supervisor(Submission.read(written(job)), 7, ["n1"], "main").attempts.start(7, ["n1"], "abc")
    status, supervised = job.supervise()
    assert status == 0 and lost.number == 1
    assert job.outcomes(supervised) == ["vanished", "finished"]


def written(job: ScriptedJob) -> Path:
    """The run folder, with the facts of a submission."""
    values = dict.fromkeys(Submission.__dataclass_fields__) | {"run": str(job.run)}
    (job.run / "submit.json").write_text(json.dumps(values))
    return job.run


def test_a_job_submitted_again_counts_from_the_start(job: ScriptedJob) -> None:
    """Somebody has looked at it in between."""
    for _ in range(2):
        job.then("step 5; exit 1")
    _, supervised = job.supervise()
    job.then("step 20")
    again = Supervisor(supervised.submission, 8, ["n1", "n2", "n3", "n4"], "main")
    assert again.run() == 0
    assert job.outcomes(again) == ["failed", "failed", "finished"]


def test_outcomes_are_written_as_words(job: ScriptedJob) -> None:
    job.then("step 20")
    _, supervised = job.supervise()
    record = json.loads((job.run / "attempts/1/attempt.json").read_text())
    assert record["outcome"] == Outcome.finished.value
    assert supervised.attempts.history()[0].reason == "at step 20 of 20"
