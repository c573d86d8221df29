"""Whether a job that starts is the run's: interrupted, outdated and simultaneous submissions end by name."""

import dataclasses
import os
import signal
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from k25_train.errors import ConfigError
from k25_train.run_folder import lock
from k25_train.run_folder.held import HeldFolder, hold
from k25_train.run_folder.process import this_process
from k25_train.run_folder.record import Holder, LockedError, new_holder
from launch import queueing, requeueing, staging, supervisor
from launch.ownership import take_run
from tests.helpers.scripted_job import ScriptedJob
from tests.helpers.scripted_queue import ScriptedQueue, a_submission, files_of, in_child, job_of, mark_of


@pytest.fixture
def login(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> ScriptedQueue:
    """A login node with an empty queue."""
    return ScriptedQueue(tmp_path, monkeypatch)


def token_in(run: Path) -> str:
    """The token of the run's submission."""
    return queueing.Submission.read(run).token


def test_a_job_takes_what_was_submitted_for_it(login: ScriptedQueue, tmp_path: Path) -> None:
    run = tmp_path / "run"
    job_id = login.submit(run, "new")
    assert take_run(run, job_id, token_in(run), 0.0).token == token_in(run)
    assert job_of(run) == job_id


def held_by(run: Path) -> tuple[HeldFolder, Holder]:
    """The folder in the hands of this process, as that of one that submits."""
    run.mkdir()
    mine = new_holder(None, this_process())
    return hold(run, None, lambda job: None, mine), mine


def test_a_job_that_starts_early_waits_for_the_folder(tmp_path: Path) -> None:
    """And replaces the earlier submission itself, if its own process did not come to that."""
    run = tmp_path / "run"
    held, mine = held_by(run)
    staging.stage(run, dataclasses.replace(a_submission(run), token=mine.id), "config new", "script new")
    threading.Timer(0.3, lambda: held.hand_over(8)).start()
    assert take_run(run, 8, mine.id, 0.0).token == mine.id
    assert job_of(run) == 8 and mark_of(run) == "new"
    assert files_of(run) == ["lock.json", "submit.json", "submit.sbatch", "submit.yaml"]


def test_a_job_whose_submission_was_killed_does_not_run(login: ScriptedQueue, tmp_path: Path) -> None:
    """Neither with what was submitted before."""
    run = tmp_path / "run"
    login.submit(run, "old")
    login.queue.write_text("")
    tokens: list[str] = []
    reading, writing = os.pipe()

    def die() -> None:
        mine = new_holder(None, this_process())
        hold(run, None, lambda job: None, mine)
        staging.stage(run, dataclasses.replace(a_submission(run), token=mine.id), "config new", "script new")
        os.write(writing, mine.id.encode())
        os.kill(os.getpid(), signal.SIGKILL)

    in_child(die)
    tokens.append(os.read(reading, 100).decode())
    with pytest.raises(
        LockedError, match="the submission of this job was interrupted before it was complete"
    ):
        take_run(run, 9, tokens[0], 0.0)
    assert mark_of(run) == "old"
    # Continuing by hand is possible, and tidies up.
    take_run(run, 10, "", 0.0)
    assert files_of(run) == ["lock.json", "submit.json", "submit.sbatch", "submit.yaml"]


def test_a_job_of_an_earlier_submission_does_not_run(login: ScriptedQueue, tmp_path: Path) -> None:
    """Such as one that an operator requeues after its end, or whose submission was undone."""
    run = tmp_path / "run"
    first = login.submit(run, "first")
    token = token_in(run)
    login.queue.write_text("")
    second = login.submit(run, "second")
    with pytest.raises(LockedError, match=f"belongs to job {second}, which is PENDING"):
        take_run(run, first, token, 0.0)
    lock.release(run, second)
    with pytest.raises(LockedError, match=f"job {first} is not of the run's last submission"):
        take_run(run, first, token, 0.0)
    assert job_of(run) is None and mark_of(run) == "second"


def test_a_job_of_the_last_submission_may_be_requeued_after_its_end(
    login: ScriptedQueue, tmp_path: Path
) -> None:
    run = tmp_path / "run"
    job_id = login.submit(run, "only")
    lock.release(run, job_id)
    assert take_run(run, job_id, token_in(run), 0.0).token == token_in(run)
    assert job_of(run) == job_id


def test_of_jobs_that_continue_by_hand_one_wins(login: ScriptedQueue, tmp_path: Path) -> None:
    run = tmp_path / "run"
    login.submit(run, "only")
    lock.release(run, 8)
    login.queue.write_text("".join(f"{job}|x\n" for job in range(20, 26)))
    statuses = []
    children = []
    for job in range(20, 26):
        pid = os.fork()
        if pid == 0:
            os._exit(in_child(lambda job=job: take_run(run, job, "", 0.0)))  # type: ignore[misc]
        children.append(pid)
    statuses = [os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) for pid in children]
    assert sorted(statuses) == [0, 2, 2, 2, 2, 2]
    assert job_of(run) == 20 + statuses.index(0)


def test_a_folder_without_a_submission_is_named(login: ScriptedQueue, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"submit\.json: does not exist: submit the run"):
        take_run(tmp_path, 8, "", 0.0)
    assert job_of(tmp_path) is None


@pytest.fixture
def main_of(job: ScriptedJob, monkeypatch: pytest.MonkeyPatch) -> Callable[[], int]:
    """Runs the supervisor's command as job 7; its status."""
    for name, value in {"ID": "7", "NODELIST": "n1,n2", "PARTITION": "main"}.items():
        monkeypatch.setenv(f"SLURM_JOB_{name}", value)
    monkeypatch.setattr(sys, "argv", ["supervisor", str(job.run)])
    submission = dataclasses.replace(a_submission(job.run), num_steps=20, legal_nodes=[2], max_restarts=3)
    submission = dataclasses.replace(submission, stop_within_s=60.0)
    submission.write(job.run)

    def call() -> int:
        try:
            supervisor.main()
        except SystemExit as end:
            return int(end.code or 0)
        return 0

    return call


def test_a_job_of_a_finished_run_starts_nothing(
    job: ScriptedJob, main_of: Callable[[], int], capsys: pytest.CaptureFixture[str]
) -> None:
    (job.run / "checkpoints/step_20").mkdir(parents=True)
    assert main_of() == 0
    assert "FINISHED: step 20 of 20 is done; nothing to do: raise train.steps" in capsys.readouterr().out
    assert not job.calls("srun") and not job.calls("checks")
    assert not (job.run / "attempts").exists() and not (job.run / "lock.json").exists()


@pytest.mark.parametrize("name", ["step_19", "step_20.partial", "step_20.unsound"])
def test_a_run_without_its_last_checkpoint_is_not_finished(
    job: ScriptedJob, main_of: Callable[[], int], name: str
) -> None:
    (job.run / "checkpoints" / name).mkdir(parents=True)
    job.then("step 20")
    assert main_of() == 0
    assert len(job.calls("srun")) == 1


def test_ranks_that_fail_after_the_last_checkpoint_are_not_started_again(
    job: ScriptedJob, main_of: Callable[[], int]
) -> None:
    job.then(f"step 20; mkdir -p {job.run}/checkpoints/step_20; exit 1")
    assert main_of() == 0
    assert len(job.calls("srun")) == 1


@pytest.mark.parametrize(
    ("state", "restarts", "goes"),
    [
        ("RUNNING", 0, True),
        ("RUNNING", 1, False),
        ("COMPLETING", 0, True),
        ("COMPLETING", 1, False),
        ("PENDING", 1, False),
    ],
)
def test_a_job_that_does_not_come_back_leaves_no_lock(
    job: ScriptedJob, monkeypatch: pytest.MonkeyPatch, state: str, restarts: int, goes: bool
) -> None:
    job.set_job_state(state)
    (job.folder / "job").write_text(f"JobId=7 Restarts={restarts} ExcNodeList=(null)\n")
    monkeypatch.delenv("SLURM_RESTART_COUNT", raising=False)
    assert requeueing.ends_for_good(7) is goes


def test_a_killed_supervisor_is_told_of_by_the_next_job(
    job: ScriptedJob, main_of: Callable[[], int], capsys: pytest.CaptureFixture[str]
) -> None:
    record = job.run / "attempts/1/attempt.json"
    record.parent.mkdir(parents=True)
    record.write_text('{"number": 1, "job_id": 6, "nodes": ["n1"], "code": "abc"}')
    time.sleep(0.01)
    job.then("step 20")
    assert main_of() == 0
    printed = capsys.readouterr().out
    assert "attempt 1 of job 6 vanished: its supervisor ended before it could record the outcome" in printed
