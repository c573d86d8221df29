"""The step that brings a job back whose first node, and with it the supervisor, is lost."""

import os
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import pytest

from k25_train.run_folder.jobs import SchedulerError
from launch.standby import wait_for_loss
from launch.submission import SUPERVISOR_LOG
from tests.helpers.project_sources import REPO
from tests.helpers.scripted_job import ScriptedJob

ALL, REST = ["n1", "n2", "n3"], ["n2", "n3"]


@pytest.mark.parametrize(
    ("looks", "is_lost"),
    [
        ([ALL, REST, REST], True),
        ([REST, ALL, REST, REST], True),
        # SLURM does not answer: that is no look.
        ([REST, None, REST], True),
        # The job was suspended for a moment.
        ([REST, [], REST, REST], True),
        # It is over, and SLURM could not end what runs on this node.
        ([ALL, [], None, []], False),
        # SLURM has lost this node, whether it has lost the first one or not.
        ([ALL, ["n1", "n2"]], False),
        ([["n2"]], False),
    ],
)
def test_what_looks_at_the_job_tell_its_last_node(looks: list[list[str] | None], is_lost: bool) -> None:
    answers = iter(looks)
    num_pauses = 0

    def nodes_of() -> list[str]:
        nodes = next(answers)
        if nodes is None:
            raise SchedulerError("Unable to contact slurm controller")
        return nodes

    def pause() -> None:
        nonlocal num_pauses
        num_pauses += 1

    assert wait_for_loss("n1", "n3", nodes_of, pause) is is_lost
    assert not list(answers) and num_pauses == len(looks) - 1


def test_it_runs_on_the_last_node_until_the_run_is_over(job: ScriptedJob) -> None:
    job.set_standby("echo $$ > $FAKE/pid; exec sleep 600")
    job.then("step 20")
    status, supervisor = job.supervise()
    assert status == 0 and job.outcomes(supervisor) == ["finished"]
    (call,) = job.calls("standby")
    assert "--nodelist=n4 " in call and "--nodes=1 " in call and "--no-kill=off" in call
    assert call.endswith(f"launch.standby {job.run} 7 n1,n2,n3,n4")
    with pytest.raises(ProcessLookupError):
        os.kill(int((job.folder / "pid").read_text()), 0)


def test_one_that_ends_is_started_again(job: ScriptedJob, capsys: pytest.CaptureFixture[str]) -> None:
    """As when its node is lost: on the last one of those that the next attempt has."""
    job.set_standby("exit 3")
    job.then("while [ ! -s $FAKE/standby.calls ]; do sleep 0.05; done; sleep 0.3; step 5; exit 1")
    job.then("step 20")
    job.supervise()
    assert len(job.calls("standby")) == 2
    assert "the standby ended with status 3; it is started again" in capsys.readouterr().out


def test_the_run_goes_on_without_one_that_cannot_be_started(
    job: ScriptedJob, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def refuse(*_arguments: object, **_options: object) -> None:
        raise BlockingIOError(11, "Resource temporarily unavailable")

    job.then("step 20")
    with monkeypatch.context() as busy:
        busy.setattr("launch.standby.subprocess", SimpleNamespace(Popen=refuse, DEVNULL=subprocess.DEVNULL))
        status, _ = job.supervise()
    assert status == 0 and "the standby could not be started" in capsys.readouterr().out


def test_a_job_of_one_node_needs_none(job: ScriptedJob) -> None:
    job.set_states(n2="down", n3="down", n4="down")
    job.then("step 20")
    status, _ = job.supervise(legal_nodes=[1])
    assert status == 0 and job.calls("standby") == []


def test_it_requeues_the_job(job: ScriptedJob, monkeypatch: pytest.MonkeyPatch) -> None:
    """The command itself, in a job that has lost n1; a request to stop is not for it."""
    _, supervisor = job.supervise(num_steps=0)
    supervisor.submission.write(job.run)
    monkeypatch.setenv("SLURM_JOB_PARTITION", "main")
    monkeypatch.setenv("SLURMD_NODENAME", "n4")
    squeue = 'case "$*" in *%N*) echo "7|RUNNING n2,n3,n4";; *) echo "7|RUNNING";; esac'
    (job.folder / "bin/squeue").write_text(f"#!/bin/sh\n{squeue}\n")
    script = (
        "import os, signal, launch.standby as s; s.LOOK_S = 0.05; "
        "wait = s.wait_for_loss; s.wait_for_loss = lambda *given: "
        "(os.kill(os.getpid(), signal.SIGUSR1), wait(*given)); s.main()"
    )
    command = [sys.executable, "-c", script, str(job.run), "7", "n1,n2,n3,n4"]
    assert subprocess.run(command, cwd=REPO, timeout=60, check=False).returncode == 0
    said = (job.run / SUPERVISOR_LOG).read_text()
    assert "n1 is lost, and with it the supervisor; job 7 goes back to the queue" in said
    assert "requeue 7" in job.calls("scontrol")


def test_it_leaves_a_later_start_of_the_job_alone(job: ScriptedJob, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its node was cut off while the job was requeued, and the job runs on other nodes by now."""
    _, supervisor = job.supervise(num_steps=0)
    supervisor.submission.write(job.run)
    monkeypatch.setenv("SLURM_JOB_PARTITION", "main")
    monkeypatch.setenv("SLURMD_NODENAME", "n4")
    monkeypatch.setenv("SLURM_RESTART_COUNT", "1")
    (job.folder / "job").write_text("JobId=7 Restarts=2 ExcNodeList=(null)\n")
    squeue = 'case "$*" in *%N*) echo "7|RUNNING n2,n3,n4";; *) echo "7|RUNNING";; esac'
    (job.folder / "bin/squeue").write_text(f"#!/bin/sh\n{squeue}\n")
    script = "import launch.standby as s; s.LOOK_S = 0.05; s.main()"
    command = [sys.executable, "-c", script, str(job.run), "7", "n1,n2,n3,n4"]
    assert subprocess.run(command, cwd=REPO, timeout=60, check=False).returncode == 0
    assert "requeue 7" not in job.calls("scontrol")


def test_it_goes_on_if_the_job_cannot_be_requeued_yet(
    job: ScriptedJob, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Nobody else would requeue it."""
    _, supervisor = job.supervise(num_steps=0)
    supervisor.submission.write(job.run)
    monkeypatch.setenv("SLURM_JOB_PARTITION", "main")
    monkeypatch.setenv("SLURMD_NODENAME", "n4")
    squeue = 'case "$*" in *%N*) echo "7|RUNNING n2,n3,n4";; *) echo "7|RUNNING";; esac'
    (job.folder / "bin/squeue").write_text(f"#!/bin/sh\n{squeue}\n")
    tool = job.folder / "bin/scontrol"
    refused = 'echo "Access denied" >&2; exit 1'
    once = f'case "$1" in requeue) if mkdir $FAKE/once 2>/dev/null; then {refused}; fi;; esac'
    tool.write_text(tool.read_text().replace("#!/bin/sh\n", f"#!/bin/sh\n{once}\n"))
    script = "import launch.standby as s; s.LOOK_S = 0.05; s.main()"
    command = [sys.executable, "-c", script, str(job.run), "7", "n1,n2,n3,n4"]
    assert subprocess.run(command, cwd=REPO, timeout=60, check=False).returncode == 0
    assert "job 7 could not be put back into the queue: scontrol requeue 7: Access denied" in (
        (job.run / SUPERVISOR_LOG).read_text()
    )
    assert "requeue 7" in job.calls("scontrol")


def test_it_ends_with_the_process_of_slurm_that_started_it(job: ScriptedJob) -> None:
    """On a node that SLURM has lost, nobody else would end it."""
    _, supervisor = job.supervise(num_steps=0)
    supervisor.submission.write(job.run)
    command = [sys.executable, "-m", "launch.standby", str(job.run), "7", "n1,n2"]
    script = (
        "import subprocess, sys; child = subprocess.Popen(sys.argv[1:]); print(child.pid, flush=True); "
        "child.wait()"
    )
    env = os.environ | {"SLURM_JOB_PARTITION": "main", "SLURMD_NODENAME": "n2"}
    started = [sys.executable, "-c", script, *command]
    with subprocess.Popen(started, cwd=REPO, env=env, stdout=subprocess.PIPE) as parent:
        assert parent.stdout is not None
        child = int(parent.stdout.readline())
        while not (job.run / SUPERVISOR_LOG).exists():
            time.sleep(0.05)
        parent.kill()
    deadline = time.monotonic() + 30.0
    while Path(f"/proc/{child}/cmdline").exists() and Path(f"/proc/{child}/cmdline").read_bytes():
        assert time.monotonic() < deadline
        time.sleep(0.05)
