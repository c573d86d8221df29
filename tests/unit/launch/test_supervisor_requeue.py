"""The supervisor with SLURM's commands as scripts: stop signals and requeueing."""

import signal

import pytest

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
    assert job.calls("scontrol") == [
        "show job 7", "show job 7", "requeue 7",
        "update JobId=7 NumNodes=4 NumCPUs=4 ExcNodeList=n3,n4",
    ]  # fmt: skip
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
    assert job.calls("scontrol")[1:] == [
        "requeue 7", "update JobId=7 NumNodes=3 NumCPUs=3 ExcNodeList=n3"
    ]  # fmt: skip


def test_a_preflight_that_leaves_too_few_nodes_anywhere_ends_the_run(
    job: ScriptedJob, capsys: pytest.CaptureFixture[str]
) -> None:
    (job.folder / "others").write_text("n5 idle\n")
    job.then_check("n3", "n4")
    status, _ = job.supervise(preflight=True, legal_nodes=[4])
    assert status == 1 and job.calls("scontrol") == ["show job 7"]
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
    assert status == 1 and job.calls("scontrol") == ["show job 7"]
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
    assert job.calls("scontrol") == ["show job 7", "requeue 7", "update JobId=7 NumNodes=4 NumCPUs=4"]


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
    assert job.calls("scontrol")[1] == "requeue 7"
