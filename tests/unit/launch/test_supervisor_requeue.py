"""The supervisor with SLURM's commands as scripts: stop signals and requeueing."""

import signal
from collections.abc import Sequence

import pytest

from launch import scheduler
from launch.history import Attempt
from launch.patience import UnwritableError
from launch.requeueing import RequeuedError
from launch.supervisor import Supervisor
from tests.helpers.scripted_job import WAIT_FOR_USR1, ScriptedJob, send_when


def test_without_enough_nodes_the_job_goes_back_for_fewer(job: ScriptedJob) -> None:
    job.set_states(n1="down", n2="drained", n3="fail")
    status, supervised = job.supervise(spare_nodes=1)
    assert status == 0 and job.outcomes(supervised) == []
    assert job.calls("scontrol")[-2:] == ["requeue 7", "update JobId=7 NumNodes=2-5 NumCPUs=2"]


def test_the_job_goes_back_without_the_nodes_that_failed_the_preflight(
    job: ScriptedJob, capsys: pytest.CaptureFixture[str]
) -> None:
    (job.folder / "others").write_text("n5 idle\nn6 allocated\n")
    job.then_check("n3", "n4")
    status, supervised = job.supervise(preflight=True, legal_nodes=[4])
    assert status == 0 and job.outcomes(supervised) == ["unfit"]
    assert job.calls("scontrol") == ["requeue 7", "update JobId=7 NumNodes=4 NumCPUs=4 ExcNodeList=n3,n4"]
    assert (
        "n3, n4 again; when they are fixed: scontrol update JobId=7 ExcNodeList=" in capsys.readouterr().out
    )


def test_a_job_that_goes_back_later_keeps_out_the_nodes_that_failed_the_preflight(job: ScriptedJob) -> None:
    """It asks for as many as it has without those, no fewer."""
    job.then_check("n3")
    job.then_check()
    job.then("step 5")
    status, supervised = job.supervise(preflight=True, legal_nodes=[2, 3])
    assert status == 0 and job.outcomes(supervised) == ["unfit", "stopped"]
    assert job.calls("scontrol") == ["requeue 7", "update JobId=7 NumNodes=3 NumCPUs=3 ExcNodeList=n3"]


def test_a_preflight_that_leaves_too_few_nodes_anywhere_ends_the_run(
    job: ScriptedJob, capsys: pytest.CaptureFixture[str]
) -> None:
    (job.folder / "others").write_text("n5 idle\n")
    job.then_check("n3", "n4")
    status, _ = job.supervise(preflight=True, legal_nodes=[4])
    assert status == 1 and not job.calls("scontrol")
    printed = capsys.readouterr().out
    assert "2 of 4 nodes are sound (n3 failed preflight, n4 failed preflight)" in printed
    assert "partition main has only 3 others" in printed


def test_nodes_that_are_down_now_may_be_repaired(job: ScriptedJob) -> None:
    """Then the job waits for them in the queue."""
    (job.folder / "others").write_text("n5 drained\nn6 down*\n")
    job.then_check("n3", "n4")
    status, _ = job.supervise(preflight=True, legal_nodes=[4])
    assert status == 0 and "requeue 7" in job.calls("scontrol")


def test_a_node_that_is_lost_and_unfit_counts_once(
    job: ScriptedJob, capsys: pytest.CaptureFixture[str]
) -> None:
    (job.folder / "others").write_text("n5 idle\n")
    job.then_check("n3", "n4")
    drain = f"printf 'n1 idle\\nn2 idle\\nn3 drained\\nn4 idle\\n' > {job.folder}/states\n"
    check = job.folder / "check_1"
    check.write_text(drain + check.read_text())
    job.supervise(preflight=True, legal_nodes=[4])
    assert "2 of 4 nodes are sound (n3 drained, n4 failed preflight)" in capsys.readouterr().out


def test_a_requeue_whose_answer_is_lost_still_gets_its_size(
    job: ScriptedJob, monkeypatch: pytest.MonkeyPatch
) -> None:
    tool = job.folder / "bin/scontrol"
    failed = f"echo PENDING > {job.folder}/state; echo 'already pending' >&2; exit 1"
    lost = f'case "$1" in requeue) {failed};; esac'
    tool.write_text(f'#!/bin/sh\necho "$*" >> "$FAKE/scontrol.calls"\n{lost}\n')
    ready = job.folder / "ready"
    job.then(WAIT_FOR_USR1.format(ready=ready))
    send_when(ready, signal.SIGUSR1)
    status, _ = job.supervise()
    assert status == 0
    assert job.calls("scontrol")[-1] == "update JobId=7 NumNodes=4 NumCPUs=4"


def test_nodes_that_failed_before_a_requeue_are_no_others_either(
    job: ScriptedJob, capsys: pytest.CaptureFixture[str]
) -> None:
    """The job keeps them in its list, and would wait in the queue forever."""
    (job.folder / "others").write_text("n5 idle\nn6 idle\n")
    (job.folder / "job").write_text("JobId=7 ReqNodeList=(null) ExcNodeList=n[5-6]\n")
    job.then_check("n3")
    status, _ = job.supervise(preflight=True, legal_nodes=[4])
    assert status == 1 and not job.calls("scontrol")
    assert "partition main has only 3 others" in capsys.readouterr().out


def test_a_job_whose_tasks_are_counted_comes_back_with_fewer(job: ScriptedJob) -> None:
    """SLURM would wait for as many nodes as it has tasks, one on each."""
    (job.folder / "job").write_text("JobId=7 ExcNodeList=(null) NtasksPerN:B:S:C=1:0:*:*\n")
    job.set_states(n1="down", n2="drained", n3="fail")
    job.supervise()
    assert job.calls("scontrol")[-1] == "update JobId=7 NumNodes=2-4 NumCPUs=2 NumTasks=2"


def test_spare_nodes_are_asked_for_again(job: ScriptedJob) -> None:
    """Of three nodes and a spare, one is down: three come back at least, and a fourth if there is one."""
    job.set_states(n2="down")
    job.then("step 5")
    status, _ = job.supervise(spare_nodes=1, legal_nodes=[1, 3])
    assert status == 0
    assert job.calls("scontrol")[-1] == "update JobId=7 NumNodes=3-4 NumCPUs=3"


@pytest.mark.parametrize("number", [signal.SIGUSR1, signal.SIGTERM])
def test_a_signal_reaches_the_ranks_and_the_job_goes_back(job: ScriptedJob, number: signal.Signals) -> None:
    ready = job.folder / "ready"
    job.then(WAIT_FOR_USR1.format(ready=ready))
    send_when(ready, number)
    status, supervised = job.supervise()
    assert status == 0 and job.outcomes(supervised) == ["stopped"]
    assert supervised.attempts.history()[0].reached == 7
    assert job.calls("scontrol") == ["requeue 7", "update JobId=7 NumNodes=4 NumCPUs=4"]


def test_a_cancelled_job_does_not_come_back(job: ScriptedJob, capsys: pytest.CaptureFixture[str]) -> None:
    ready = job.folder / "ready"
    job.then(WAIT_FOR_USR1.format(ready=ready))
    job.set_job_state("COMPLETING")
    send_when(ready, signal.SIGTERM)
    status, _ = job.supervise()
    assert status == 1 and not job.calls("scontrol")
    assert "job 7 is COMPLETING, so the supervisor does not requeue it" in capsys.readouterr().out


def test_ranks_that_do_not_stop_are_left_in_time_to_go_back(job: ScriptedJob) -> None:
    ready = job.folder / "ready"
    job.then(f"trap '' USR1; step 6; touch {ready}; while :; do sleep 0.05; done")
    send_when(ready, signal.SIGUSR1)
    status, supervised = job.supervise(stop_within_s=1.0)
    assert status == 0 and job.outcomes(supervised) == ["stopped"]
    assert job.calls("scontrol")[0] == "requeue 7"


def test_a_supervisor_whose_node_was_taken_away_puts_the_job_back(job: ScriptedJob) -> None:
    """It lives, since only SLURM's daemon on its node is gone."""
    (job.folder / "bin/squeue").write_text(
        '#!/bin/sh\ncase "$*" in *%N*) echo "7|$(cat $FAKE/state)";; *) echo "7|RUNNING";; esac\n'
    )
    job.set_job_state("RUNNING n1,n2,n3,n4")
    job.then("step 5; echo 'RUNNING n2,n3,n4' > $FAKE/state; exit 1")
    status, supervised = job.supervise()
    assert status == 0 and job.outcomes(supervised) == ["node_lost"]
    assert "requeue 7" in job.calls("scontrol")


def test_a_supervisor_starts_nothing_in_a_later_start_of_its_job(
    job: ScriptedJob, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SLURM_RESTART_COUNT", "1")
    (job.folder / "job").write_text("JobId=7 Restarts=1 ExcNodeList=(null)\n")
    job.then("step 5; sed -i s/Restarts=1/Restarts=2/ $FAKE/job; exit 1")
    job.then("step 20")
    with pytest.raises(RequeuedError, match="job 7 was put back into the queue"):
        job.supervise()
    assert len(job.calls("srun")) == 1 and "requeue 7" not in job.calls("scontrol")


def test_a_step_is_not_created_in_a_later_start_of_the_job(
    job: ScriptedJob, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It waits while SLURM cannot create a step, and the job is requeued meanwhile."""
    monkeypatch.setattr("launch.step_creation.RETRY_S", 0.01)
    monkeypatch.delenv("SLURM_RESTART_COUNT", raising=False)
    (job.folder / "job").write_text("JobId=7 Restarts=0 ExcNodeList=(null)\n")
    away = "srun: error: Unable to create step for job 7: Job/step already completing or completed"
    job.then(f"echo '{away}' >&2; sed -i s/Restarts=0/Restarts=1/ $FAKE/job; exit 1")
    job.then("step 20")
    with pytest.raises(RequeuedError):
        job.supervise()
    assert len(job.calls("srun")) == 1


def test_the_job_goes_back_though_the_run_folder_does_not_tell_whom_to_exclude(
    job: ScriptedJob, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A server that is away when the time limit comes."""

    def away() -> list[Attempt]:
        raise UnwritableError("the server is away")

    ready = job.folder / "ready"
    job.then(WAIT_FOR_USR1.format(ready=ready))
    send_when(ready, signal.SIGUSR1)
    after = Supervisor.run_attempt

    def run_attempt(self: Supervisor, nodes: Sequence[str], left_out: dict[str, str]) -> Attempt:
        attempt = after(self, nodes, left_out)
        monkeypatch.setattr(self, "history", away)
        return attempt

    monkeypatch.setattr(Supervisor, "run_attempt", run_attempt)
    status, _ = job.supervise()
    assert status == 0 and "requeue 7" in job.calls("scontrol")


def test_a_task_of_an_array_goes_back_alone(job: ScriptedJob) -> None:
    """Its number may be the array's, and then stands for all tasks."""
    other = "JobId=8 ArrayJobId=7 ArrayTaskId=1 JobName=x\n   Restarts=3 ExcNodeList=n4\n"
    own = "JobId=7 ArrayJobId=7 ArrayTaskId=2 JobName=x\n   Restarts=0 ExcNodeList=n3\n"
    (job.folder / "job").write_text(f"{other}\n{own}")
    assert scheduler.num_restarts(7, 0.0) == 0 and scheduler.excluded_nodes(7, 0.0) == ["n3"]
    scheduler.requeue(7, 2, 2, [], 0.0)
    calls = job.calls("scontrol")
    assert "requeue 7_2" in calls and "update JobId=7_2 NumNodes=2 NumCPUs=2" in calls
