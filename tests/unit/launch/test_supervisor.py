"""The supervisor between SLURM's commands, which are scripts here: what it starts, waits for and gives up."""

import json
import os
import signal
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from launch import attempt_steps, scheduler
from launch.preflight.findings import failed, passed
from launch.preflight.report import write_report
from launch.restart_policy import Outcome
from launch.scheduler import SchedulerError, ask, job_state, unusable
from launch.submission import Submission
from launch.supervisor import Supervisor

NUM_STEPS = 20
TOOLS = {
    "srun": """
case "$*" in *launch.rendezvous*)
    echo "$*" >> "$FAKE/rendezvous.calls"
    echo "welcome"; echo '{"address": "n1", "port": "29500"}'; exit 0;;
esac
case "$*" in *launch.preflight_rank*)
    echo "$*" >> "$FAKE/checks.calls"; exec sh "$FAKE/check_$(wc -l < "$FAKE/checks.calls")";;
esac
echo "$*" >> "$FAKE/srun.calls"
exec sh "$FAKE/behaviour_$(wc -l < "$FAKE/srun.calls")"
""",
    "sinfo": """
case "$*" in *--partition=main*) cat "$FAKE/others"; esac
cat "$FAKE/states" """,
    "squeue": 'cat "$FAKE/state"',
    "scontrol": """
case "$1 $2" in "show hostnames") echo "$3" | sed "s/n\\[5-6\\]/n5,n6/" | tr , "\\n"; exit;; esac
echo "$*" >> "$FAKE/scontrol.calls"
case "$1 $2" in "show job") cat "$FAKE/job";; esac""",
}


class Job:
    """A job whose ranks behave as a test says."""

    def __init__(self, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        """On nodes n1 to n4, all sound."""
        self.folder = folder
        self.run = folder / "run"
        self.run.mkdir()
        for name, script in TOOLS.items():
            (folder / "bin").mkdir(exist_ok=True)
            path = folder / "bin" / name
            path.write_text(f"#!/bin/sh\n{script}\n")
            path.chmod(0o755)
        monkeypatch.setenv("PATH", f"{folder}/bin:{os.environ['PATH']}")
        monkeypatch.setenv("FAKE", str(folder))
        self.set_states()
        self.set_job_state("RUNNING")
        (folder / "others").touch()
        (folder / "job").write_text("JobId=7 ExcNodeList=(null)\n")
        self.num_behaviours = self.num_checks = 0

    def set_states(self, **states: str) -> None:
        """What sinfo says of the nodes; those not named are allocated."""
        nodes = {f"n{number}": "allocated" for number in range(1, 5)} | states
        (self.folder / "states").write_text("".join(f"{node} {state}\n" for node, state in nodes.items()))

    def set_job_state(self, state: str) -> None:
        """What squeue says of the job."""
        (self.folder / "state").write_text(f"{state}\n")

    def then(self, script: str) -> None:
        """What the ranks of the next attempt do, as a shell script; `step N` writes metrics."""
        self.num_behaviours += 1
        function = f"""step() {{ echo "{{\\"step\\": $1}}" >> {self.run}/metrics.jsonl; }}\n"""
        (self.folder / f"behaviour_{self.num_behaviours}").write_text(function + script + "\n")

    def then_check(self, *unfit: str, status: int = 0) -> None:
        """What the next preflight finds: a missing GPU on these nodes. Without any nodes but with a status
        it ends without a report."""
        self.num_checks += 1
        lines = ["echo 'srun: error: n3: task 2: Exited with exit code 1' >&2"] if unfit or status else []
        if unfit or not status:
            findings = {node: [failed("gpus", "7 GPUs", "8 GPUs", "drain it")] for node in unfit}
            folder = self.folder / f"report_{self.num_checks}"
            write_report(folder, {"n0": [passed("gpus", "8 GPUs")], **findings}, {})
            lines.append(f"cp {folder}/preflight.json {self.run}/attempts/latest/preflight.json")
        script = "\n".join([*lines, f"exit {status}"])
        (self.folder / f"check_{self.num_checks}").write_text(script + "\n")

    def supervise(self, **changes: object) -> tuple[int, Supervisor]:
        """Run the supervisor to its end; its status and itself."""
        values: dict[str, object] = {
            "run": str(self.run), "checkout": str(self.folder), "code": "abc", "python": "python",
            "num_steps": NUM_STEPS, "ranks_per_node": 8, "legal_nodes": [2, 4], "spare_nodes": 0,
            "max_restarts": 3, "restart_wait_s": 0.0, "stop_within_s": 60.0, "preflight": False,
            "rendezvous_port": 29500, "interface": None, "container": [], "environment": [],
        }  # fmt: skip
        submission = Submission(**(values | changes))  # type: ignore[arg-type]
        job = Supervisor(submission, 7, ["n1", "n2", "n3", "n4"], "main")
        return job.run(), job

    def calls(self, tool: str) -> list[str]:
        """Arguments of each call."""
        log = self.folder / f"{tool}.calls"
        return log.read_text().splitlines() if log.exists() else []

    def outcomes(self, job: Supervisor) -> list[str | None]:
        """How the attempts ended."""
        return [attempt.outcome for attempt in job.attempts.history()]


@pytest.fixture
def job(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Job]:
    """A job on four sound nodes."""
    handlers = {number: signal.getsignal(number) for number in (signal.SIGUSR1, signal.SIGTERM)}
    yield Job(tmp_path, monkeypatch)
    for number, handler in handlers.items():
        signal.signal(number, handler)


def test_ranks_start_once_on_all_nodes_and_finish(job: Job) -> None:
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


def test_checks_and_ranks_run_in_the_container(job: Job) -> None:
    job.then_check()
    job.then("step 20")
    job.supervise(preflight=True, interface="bond0", container=["--container-image=k25.sqsh"])
    inside = "--container-image=k25.sqsh python -m launch."
    asked = job.calls("rendezvous")
    assert len(asked) == 2
    # Before any image is there.
    assert all(call.endswith(f"{sys.executable} -m launch.rendezvous 29500 bond0") for call in asked)
    assert not any("--container" in call for call in asked)
    assert f"{inside}preflight_rank " in job.calls("checks")[0] and f"{inside}node " in job.calls("srun")[0]


def test_a_failure_is_tried_again_in_the_same_job(job: Job) -> None:
    job.then("step 5; echo 'srun: error: n2: task 1: Killed' >&2; exit 137")
    job.then("step 20")
    status, supervised = job.supervise()
    assert status == 0 and job.outcomes(supervised) == ["failed", "finished"]
    first = supervised.attempts.history()[0]
    assert (first.reached, first.first_to_fail) == (5, "n2")


def test_two_failures_at_a_step_end_the_run(job: Job, capsys: pytest.CaptureFixture[str]) -> None:
    for _ in range(2):
        job.then("step 5; exit 1")
    status, _ = job.supervise(restart_wait_s=0.0)
    assert status == 1 and len(job.calls("srun")) == 2
    printed = capsys.readouterr().out
    assert "GIVEN UP: attempts 1 and 2 both failed after step 5" in printed
    assert f"when their cause is fixed: sbatch {job.run}/submit.sbatch" in printed


def test_a_lost_node_is_replaced_by_a_spare_then_replicas_are_fewer(job: Job) -> None:
    states = f"cat > {job.folder}/states"
    job.then(f"step 3; printf 'n1 allocated\\nn2 down*\\nn3 mixed-\\nn4 idle\\n' | {states}; exit 1")
    job.then(f"step 6; printf 'n1 draining\\nn2 down*\\nn3 mixed-\\nn4 idle\\n' | {states}; exit 1")
    job.then("step 20")
    status, supervised = job.supervise(legal_nodes=[2, 3])
    assert status == 0 and job.outcomes(supervised) == ["node_lost", "node_lost", "finished"]
    nodes = [attempt.nodes for attempt in supervised.attempts.history()]
    assert nodes == [["n1", "n2", "n3"], ["n1", "n3", "n4"], ["n3", "n4"]]
    assert "n2 is down*" in supervised.attempts.history()[0].reason


def test_a_lost_node_that_comes_back_is_no_longer_the_jobs(job: Job) -> None:
    """SLURM has taken it from the job, so no step starts on it, however idle it is."""
    take = f"echo 'RUNNING n1,n3,n4' > {job.folder}/state"
    job.then(f"step 3; {take}; echo 'srun: error: Node failure on n2' >&2; exit 1")
    job.then("step 20")
    status, supervised = job.supervise(legal_nodes=[3])
    assert status == 0 and job.outcomes(supervised) == ["node_lost", "finished"]
    first, second = supervised.attempts.history()
    assert (first.nodes, second.nodes) == (["n1", "n2", "n3"], ["n1", "n3", "n4"])
    assert "n2 is no longer the job's" in first.reason


def test_without_enough_nodes_the_job_goes_back_for_fewer(job: Job) -> None:
    job.set_states(n1="down", n2="drained", n3="fail")
    status, supervised = job.supervise(spare_nodes=1)
    assert status == 0 and job.outcomes(supervised) == []
    assert job.calls("scontrol") == ["requeue 7", "update JobId=7 NumNodes=2-5 NumTasks=2 NumCPUs=2"]


WAIT_FOR_USR1 = "trap 'step 7; exit 0' USR1; step 6; touch {ready}; while :; do sleep 0.05; done"


def send_when(path: Path, number: signal.Signals) -> None:
    """SIGUSR1 or SIGTERM to this process as soon as a file is there."""

    def send() -> None:
        while not path.exists():
            threading.Event().wait(0.02)
        os.kill(os.getpid(), number)

    threading.Thread(target=send, daemon=True).start()


@pytest.mark.parametrize("number", [signal.SIGUSR1, signal.SIGTERM])
def test_a_signal_reaches_the_ranks_and_the_job_goes_back(job: Job, number: signal.Signals) -> None:
    ready = job.folder / "ready"
    job.then(WAIT_FOR_USR1.format(ready=ready))
    send_when(ready, number)
    status, supervised = job.supervise()
    assert status == 0 and job.outcomes(supervised) == ["stopped"]
    assert supervised.attempts.history()[0].reached == 7
    assert job.calls("scontrol") == ["requeue 7", "update JobId=7 NumNodes=4 NumTasks=4 NumCPUs=4"]


def test_a_cancelled_job_does_not_come_back(job: Job, capsys: pytest.CaptureFixture[str]) -> None:
    ready = job.folder / "ready"
    job.then(WAIT_FOR_USR1.format(ready=ready))
    job.set_job_state("COMPLETING")
    send_when(ready, signal.SIGTERM)
    status, _ = job.supervise()
    assert status == 1 and not job.calls("scontrol")
    assert "job 7 is COMPLETING, so the supervisor does not requeue it" in capsys.readouterr().out


def test_ranks_that_do_not_stop_are_left_in_time_to_go_back(job: Job) -> None:
    ready = job.folder / "ready"
    job.then(f"trap '' USR1; step 6; touch {ready}; while :; do sleep 0.05; done")
    send_when(ready, signal.SIGUSR1)
    status, supervised = job.supervise(stop_within_s=1.0)
    assert status == 0 and job.outcomes(supervised) == ["stopped"]
    assert job.calls("scontrol")[0] == "requeue 7"


def test_srun_that_waits_for_a_lost_node_is_ended(job: Job, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(attempt_steps, "STEP_END_S", 0.5)
    job.then("step 3; echo 'srun: error: n1: task 0: Exited with exit code 1' >&2; sleep 20")
    job.then("step 20")
    status, supervised = job.supervise()
    assert status == 0 and job.outcomes(supervised) == ["failed", "finished"]


def test_what_a_node_prints_need_not_be_text(job: Job) -> None:
    """Ranks would go on unwatched along with those of the next attempt."""
    job.then("printf 'caf\\351\\n' >&2; sleep 1.2; step 20")
    status, supervised = job.supervise()
    assert status == 0 and job.outcomes(supervised) == ["finished"]


def test_a_log_that_cannot_be_read_ends_nothing(job: Job) -> None:
    job.then(f"rm {job.run}/attempts/1/srun.log; sleep 1.2; step 20")
    status, supervised = job.supervise()
    assert status == 0 and job.outcomes(supervised) == ["finished"]


def test_a_preflight_that_ends_well_without_a_report_is_a_failure(job: Job) -> None:
    for number in (1, 2):
        (job.folder / f"check_{number}").write_text("exit 0")
    status, supervised = job.supervise(preflight=True)
    assert status == 1 and job.outcomes(supervised) == ["failed", "failed"]
    assert not job.calls("srun")


def test_no_rank_starts_after_a_signal_to_a_preflight_that_passes(job: Job) -> None:
    job.then_check()
    ready, check = job.folder / "ready", job.folder / "check_1"
    check.write_text(f"trap '' TERM; touch {ready}; sleep 1\n" + check.read_text())
    send_when(ready, signal.SIGUSR1)
    status, supervised = job.supervise(preflight=True)
    assert status == 0 and job.outcomes(supervised) == ["stopped"]
    assert not job.calls("srun")


def test_nodes_are_checked_before_every_start(job: Job) -> None:
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


def test_a_node_that_fails_the_preflight_is_left_out_and_those_left_are_checked(job: Job) -> None:
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


def test_the_job_goes_back_without_the_nodes_that_failed_the_preflight(
    job: Job, capsys: pytest.CaptureFixture[str]
) -> None:
    (job.folder / "others").write_text("n5 idle\nn6 allocated\n")
    job.then_check("n3", "n4")
    status, supervised = job.supervise(preflight=True, legal_nodes=[4])
    assert status == 0 and job.outcomes(supervised) == ["unfit"]
    assert job.calls("scontrol") == [
        "show job 7", "show job 7", "requeue 7",
        "update JobId=7 NumNodes=4 NumTasks=4 NumCPUs=4 ExcNodeList=n3,n4",
    ]  # fmt: skip
    assert (
        "n3, n4 again; when they are fixed: scontrol update JobId=7 ExcNodeList=" in capsys.readouterr().out
    )


def test_a_job_that_goes_back_later_keeps_out_the_nodes_that_failed_the_preflight(job: Job) -> None:
    """It asks for as many as it has without those, no fewer."""
    job.then_check("n3")
    job.then_check()
    job.then("step 5")
    status, supervised = job.supervise(preflight=True, legal_nodes=[2, 3])
    assert status == 0 and job.outcomes(supervised) == ["unfit", "stopped"]
    assert job.calls("scontrol")[1:] == [
        "requeue 7", "update JobId=7 NumNodes=3 NumTasks=3 NumCPUs=3 ExcNodeList=n3"
    ]  # fmt: skip


def test_a_preflight_that_leaves_too_few_nodes_anywhere_ends_the_run(
    job: Job, capsys: pytest.CaptureFixture[str]
) -> None:
    (job.folder / "others").write_text("n5 idle\n")
    job.then_check("n3", "n4")
    status, _ = job.supervise(preflight=True, legal_nodes=[4])
    assert status == 1 and job.calls("scontrol") == ["show job 7"]
    printed = capsys.readouterr().out
    assert "2 of 4 nodes are sound (n3 failed preflight, n4 failed preflight)" in printed
    assert "partition main has only 3 others" in printed


def test_nodes_that_are_down_now_may_be_repaired(job: Job) -> None:
    """Then the job waits for them in the queue."""
    (job.folder / "others").write_text("n5 drained\nn6 down*\n")
    job.then_check("n3", "n4")
    status, _ = job.supervise(preflight=True, legal_nodes=[4])
    assert status == 0 and "requeue 7" in job.calls("scontrol")


def test_a_node_that_is_lost_and_unfit_counts_once(job: Job, capsys: pytest.CaptureFixture[str]) -> None:
    (job.folder / "others").write_text("n5 idle\n")
    job.then_check("n3", "n4")
    drain = f"printf 'n1 idle\\nn2 idle\\nn3 drained\\nn4 idle\\n' > {job.folder}/states\n"
    check = job.folder / "check_1"
    check.write_text(drain + check.read_text())
    job.supervise(preflight=True, legal_nodes=[4])
    assert "2 of 4 nodes are sound (n3 drained, n4 failed preflight)" in capsys.readouterr().out


def test_a_requeue_whose_answer_is_lost_has_its_size_all_the_same(
    job: Job, monkeypatch: pytest.MonkeyPatch
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
    assert job.calls("scontrol")[-1] == "update JobId=7 NumNodes=4 NumTasks=4 NumCPUs=4"


def test_nodes_that_failed_before_a_requeue_are_no_others_either(
    job: Job, capsys: pytest.CaptureFixture[str]
) -> None:
    """The job keeps them in its list, and would wait in the queue forever."""
    (job.folder / "others").write_text("n5 idle\nn6 idle\n")
    (job.folder / "job").write_text("JobId=7 ReqNodeList=(null) ExcNodeList=n[5-6]\n")
    job.then_check("n3")
    status, _ = job.supervise(preflight=True, legal_nodes=[4])
    assert status == 1 and job.calls("scontrol") == ["show job 7"]
    assert "partition main has only 3 others" in capsys.readouterr().out


def test_a_preflight_that_fails_on_every_node_ends_the_run(
    job: Job, capsys: pytest.CaptureFixture[str]
) -> None:
    (job.folder / "others").write_text("n5 idle\nn6 idle\nn7 idle\nn8 idle\n")
    job.then_check("n1", "n2", "n3", "n4")
    status, _ = job.supervise(preflight=True)
    assert status == 1 and not job.calls("srun")
    assert "GIVEN UP: all 4 nodes of attempt 1 failed preflight" in capsys.readouterr().out


def test_a_preflight_without_a_report_is_a_failure(job: Job) -> None:
    for _ in range(2):
        job.then_check(status=3)
    status, supervised = job.supervise(preflight=True)
    assert status == 1 and job.outcomes(supervised) == ["failed", "failed"]
    assert not job.calls("srun")
    first = supervised.attempts.history()[0]
    assert first.first_to_fail == "n3"
    assert "first on n3, see preflight.log and preflight_srun.log" in first.reason


def test_a_first_node_that_leaves_no_report_is_left_out(job: Job) -> None:
    job.then_check(status=3)
    job.then_check()
    job.then("step 20")
    status, supervised = job.supervise(preflight=True, legal_nodes=[3])
    assert status == 0 and job.outcomes(supervised) == ["failed", "finished"]
    nodes = [attempt.nodes for attempt in supervised.attempts.history()]
    assert nodes == [["n1", "n2", "n3"], ["n2", "n3", "n4"]]


def test_a_signal_ends_the_search_for_a_rendezvous(job: Job) -> None:
    ready = job.folder / "ready"
    late = job.folder / "late"
    hanging = f"touch {ready}; sleep 4 >/dev/null 2>&1; touch {late}"
    (job.folder / "bin/srun").write_text(f"#!/bin/sh\n{hanging}\n")
    send_when(ready, signal.SIGUSR1)
    status, supervised = job.supervise()
    assert status == 0 and job.outcomes(supervised) == ["stopped"]
    assert not late.exists()


@pytest.mark.parametrize("obeys", [True, False])
def test_a_signal_ends_a_preflight(job: Job, monkeypatch: pytest.MonkeyPatch, obeys: bool) -> None:
    monkeypatch.setattr(attempt_steps, "STEP_END_S", 0.5)
    ready = job.folder / "ready"
    deaf = "" if obeys else "trap '' TERM;"
    (job.folder / "check_1").write_text(f"{deaf} touch {ready}; while :; do sleep 0.05; done")
    send_when(ready, signal.SIGUSR1)
    status, supervised = job.supervise(preflight=True)
    assert status == 0 and job.outcomes(supervised) == ["stopped"]
    assert job.calls("scontrol")[0] == "requeue 7" and not job.calls("srun")


def test_a_preflight_that_does_not_end_is_ended(job: Job, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(attempt_steps, "PREFLIGHT_S", 0.5)
    for number in (1, 2):
        (job.folder / f"check_{number}").write_text("while :; do sleep 0.05; done")
    status, supervised = job.supervise(preflight=True)
    assert status == 1 and job.outcomes(supervised) == ["failed", "failed"]


def test_a_node_that_hangs_holds_nobody_after_the_report(job: Job, monkeypatch: pytest.MonkeyPatch) -> None:
    """It does not end by itself, though the others have named it."""
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


def test_an_attempt_whose_supervisor_was_lost_counts(job: Job) -> None:
    job.then("step 20")
    lost = Supervisor(Submission.read(written(job)), 7, ["n1"], "main").attempts.start(7, ["n1"], "abc")
    status, supervised = job.supervise()
    assert status == 0 and lost.number == 1
    assert job.outcomes(supervised) == ["vanished", "finished"]


def written(job: Job) -> Path:
    """The run folder, with the facts of a submission."""
    values = dict.fromkeys(Submission.__dataclass_fields__) | {"run": str(job.run)}
    (job.run / "submit.json").write_text(json.dumps(values))
    return job.run


def test_a_job_submitted_again_counts_from_the_start(job: Job) -> None:
    """Somebody has looked at it in between."""
    for _ in range(2):
        job.then("step 5; exit 1")
    _, supervised = job.supervise()
    job.then("step 20")
    again = Supervisor(supervised.submission, 8, ["n1", "n2", "n3", "n4"], "main")
    assert again.run() == 0
    assert job.outcomes(again) == ["failed", "failed", "finished"]


@pytest.mark.parametrize(
    ("state", "is_usable"),
    [
        ("allocated", True), ("mixed-", True), ("idle", True), ("completing", True), ("idle@", True),
        ("allocated*", False), ("down", False), ("down*", False), ("draining", False), ("drained*", False),
        ("failing", False), ("unknown", False), ("idle~", False),
    ],
)  # fmt: skip
def test_states_of_nodes(job: Job, state: str, is_usable: bool) -> None:
    job.set_states(n2=state)
    assert unusable(["n1", "n2"]) == ({} if is_usable else {"n2": state})


@pytest.mark.parametrize(
    "words",
    ["Unable to contact slurm controller (connect failure)", "Job is in transitional state, retry later"],
)
def test_a_controller_that_is_away_is_waited_for(
    job: Job, monkeypatch: pytest.MonkeyPatch, words: str
) -> None:
    monkeypatch.setattr(scheduler, "RETRY_S", 0.01)
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
def test_other_errors_are_not_waited_for(job: Job, words: str, expected: str | None) -> None:
    (job.folder / "bin/squeue").write_text(f"#!/bin/sh\necho 'squeue: {words}' >&2; exit 1\n")
    if expected is None:
        assert job_state(7, patience_s=600.0) is None
    else:
        with pytest.raises(SchedulerError, match="Access denied"):
            job_state(7, patience_s=600.0)


def test_what_users_have_slurm_hide_is_seen(job: Job, monkeypatch: pytest.MonkeyPatch) -> None:
    (job.folder / "bin/squeue").write_text('#!/bin/sh\necho "${SQUEUE_USERS:-RUNNING}"\n')
    monkeypatch.setenv("SQUEUE_USERS", "somebody")
    assert job_state(7) == "RUNNING"


def test_arguments_reach_slurm_as_they_are(job: Job) -> None:
    ask("scontrol", "show", "a b", "$(touch x)")
    assert job.calls("scontrol") == ["show a b $(touch x)"]


def test_outcomes_are_written_as_words(job: Job) -> None:
    job.then("step 20")
    _, supervised = job.supervise()
    record = json.loads((job.run / "attempts/1/attempt.json").read_text())
    assert record["outcome"] == Outcome.finished.value
    assert supervised.attempts.history()[0].reason == "at step 20 of 20"
