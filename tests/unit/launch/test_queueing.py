"""Submissions are all or nothing: refused, killed at every step, or with an answer that is lost."""

import os
import signal
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

import pytest

from k25_train.run_folder import jobs
from k25_train.run_folder.held import HeldFolder, hold
from k25_train.run_folder.jobs import SchedulerError
from k25_train.run_folder.record import LockedError
from launch import guard, queueing, scheduler, staging
from launch.submission import Submission
from tests.helpers.scripted_queue import ScriptedQueue, files_of, in_child, job_of, mark_of

SUBMITTED = ["lock.json", "submit.json", "submit.sbatch", "submit.yaml"]
WAIT_S = 30.0


@pytest.fixture
def login(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> ScriptedQueue:
    """A login node with an empty queue, where nobody waits long."""
    monkeypatch.setattr(jobs, "RETRY_S", 0.01)
    monkeypatch.setattr(guard, "LATE_S", 0.2)
    return ScriptedQueue(tmp_path, monkeypatch)


def submitted_before(login: ScriptedQueue, run: Path) -> dict[str, bytes]:
    """Submit a run and let its job end; the files that it leaves."""
    login.submit(run, "old")
    login.queue.write_text("")
    return {path.name: path.read_bytes() for path in run.iterdir() if path.name.startswith("submit.")}


def assert_as_before(run: Path, before: dict[str, bytes]) -> None:
    """Check that a folder has the earlier submission, and nothing else."""
    after = {path.name: path.read_bytes() for path in run.iterdir() if path.name != "lock.json"}
    assert after == before


def wait_until(is_so: Callable[[], bool]) -> None:
    """Return as soon as something is so; the test fails if it never is."""
    deadline = time.monotonic() + WAIT_S
    while not is_so():
        assert time.monotonic() < deadline
        time.sleep(0.02)


def kill_self() -> None:
    """SIGKILL, which no process survives."""
    os.kill(os.getpid(), signal.SIGKILL)


def test_a_submission_replaces_the_earlier_one(login: ScriptedQueue, tmp_path: Path) -> None:
    run = tmp_path / "runs/x"
    submitted_before(login, run)
    job_id = login.submit(run, "new")
    assert (mark_of(run), job_of(run), login.jobs()) == ("new", job_id, [job_id])
    assert files_of(run) == SUBMITTED
    (command,) = login.queue.read_text().splitlines()
    assert command.endswith(f" {Submission.read(run).token}")


def test_a_refused_submission_leaves_that_of_the_holder(login: ScriptedQueue, tmp_path: Path) -> None:
    run = tmp_path / "run"
    job_id = login.submit(run, "accepted")
    before = {path.name: path.read_bytes() for path in run.iterdir()}
    with pytest.raises(LockedError, match=f"belongs to job {job_id}, which is PENDING"):
        login.submit(run, "refused")
    assert {path.name: path.read_bytes() for path in run.iterdir()} == before
    assert login.jobs() == [job_id] and not login.cancelled()


def test_a_submission_while_ranks_train_by_hand_is_refused(login: ScriptedQueue, tmp_path: Path) -> None:
    def train() -> None:
        hold(tmp_path, None, lambda job: None)
        time.sleep(WAIT_S)

    pid = os.fork()
    if pid == 0:
        train()
        os._exit(0)
    try:
        wait_until((tmp_path / "lock.json").exists)
        with pytest.raises(LockedError, match=f"in use by process {pid}"):
            login.submit(tmp_path, "refused")
        assert not login.jobs() and "submit.json" not in files_of(tmp_path)
    finally:
        os.kill(pid, signal.SIGKILL)
        os.waitpid(pid, 0)


@pytest.mark.parametrize("is_first", [True, False])
def test_what_sbatch_refuses_leaves_no_trace(login: ScriptedQueue, tmp_path: Path, is_first: bool) -> None:
    run = tmp_path / "runs/x"
    before = {} if is_first else submitted_before(login, run)
    login.before_queueing("echo 'sbatch: error: Invalid account' >&2; exit 1")
    with pytest.raises(SchedulerError, match="Invalid account"):
        login.submit(run, "new")
    assert not login.jobs()
    if is_first:
        assert not (tmp_path / "runs").exists()
    else:
        assert_as_before(run, before)
        assert job_of(run) is None


def test_a_full_disk_leaves_no_trace(
    login: ScriptedQueue, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(_submission: Submission, _folder: Path) -> None:
        raise OSError(28, "No space left on device")

    run = tmp_path / "run"
    before = submitted_before(login, run)
    monkeypatch.setattr(Submission, "write", full)
    with pytest.raises(OSError, match="No space left"):
        login.submit(run, "new")
    assert_as_before(run, before)
    assert not login.jobs() and job_of(run) is None


STEPS: dict[str, tuple[object, str]] = {
    "before the lock": (queueing, "take"),
    "before staging": (staging, "stage"),
    "in staging": (Submission, "write"),
    "before sbatch": (scheduler, "estimate_start"),
    "after sbatch": (HeldFolder, "hand_over"),
}
"""Where a submission may be killed before its job has the folder: at the call of this."""
LATE_STEPS: dict[str, tuple[object, str]] = {
    "before the files": (staging, "commit"),
    "between the files": (staging, "discard"),
    "at the end": (queueing.Sbatch, "cancel_others"),
}
"""The same once its job has it."""


@pytest.mark.parametrize("is_first", [True, False])
@pytest.mark.parametrize("step", STEPS)
def test_killed_before_its_job_has_the_folder_it_leaves_no_trace(
    login: ScriptedQueue, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, step: str, is_first: bool
) -> None:
    run = tmp_path / "runs/x"
    before = {} if is_first else submitted_before(login, run)
    monkeypatch.setattr(*STEPS[step], lambda *_arguments: kill_self())
    assert in_child(lambda: login.submit(run, "new")) == -signal.SIGKILL
    if is_first:
        wait_until(lambda: not (tmp_path / "runs").exists())
    else:
        wait_until(lambda: files_of(run) in (sorted(before), sorted([*before, "lock.json"])))
        # Killed before it had the lock, it leaves that of the job which has ended.
        wait_until(lambda: step == "before the lock" or not (run / "lock.json").exists())
        assert_as_before(run, before)
    assert not login.jobs()
    assert len(login.cancelled()) == (step == "after sbatch")


@pytest.mark.parametrize("step", LATE_STEPS)
def test_killed_once_its_job_has_the_folder_it_is_completed(
    login: ScriptedQueue, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, step: str
) -> None:
    run = tmp_path / "run"
    submitted_before(login, run)

    def killed(*arguments: object) -> None:
        # The folder that is discarded at the beginning does not exist.
        if step != "between the files" or (run / "submit.yaml").read_text() == "config new\n":
            kill_self()

    monkeypatch.setattr(*LATE_STEPS[step], killed)
    assert in_child(lambda: login.submit(run, "new")) == -signal.SIGKILL
    wait_until(lambda: files_of(run) == SUBMITTED)
    assert mark_of(run) == "new"
    assert login.jobs() == [job_of(run)] and not login.cancelled()


def test_killed_while_sbatch_runs_its_job_is_cancelled(login: ScriptedQueue, tmp_path: Path) -> None:
    """sbatch goes on, and queues the job after its caller's end."""
    run = tmp_path / "run"
    before = submitted_before(login, run)
    login.before_queueing('kill -9 "$PPID"; sleep 0.3')
    assert in_child(lambda: login.submit(run, "new")) == -signal.SIGKILL
    wait_until(lambda: login.cancelled() == [9] and files_of(run) == sorted(before))
    assert not login.jobs()
    assert_as_before(run, before)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_interrupted_while_sbatch_runs_it_leaves_no_trace(
    login: ScriptedQueue, tmp_path: Path, number: signal.Signals
) -> None:
    run = tmp_path / "run"
    before = submitted_before(login, run)
    login.before_queueing(f'kill -{number.value} "$PPID"; sleep 0.3')
    assert in_child(lambda: login.submit(run, "new")) == 130
    assert login.cancelled() == [9] and not login.jobs() and files_of(run) == sorted(before)
    assert_as_before(run, before)


LOST = "echo 'sbatch: error: Unable to contact slurm controller (receive failure)' >&2; exit 1"


def test_a_job_whose_answer_is_lost_is_found(login: ScriptedQueue, tmp_path: Path) -> None:
    login.after_queueing(LOST)
    assert login.submit(tmp_path / "run", "new") == 8
    assert login.jobs() == [8] and job_of(tmp_path / "run") == 8


def test_a_job_that_turns_up_late_is_cancelled(login: ScriptedQueue, tmp_path: Path) -> None:
    """The answer to the first sbatch is lost, and its job is in the queue only after the second one's."""
    late = f'echo "$2 $3" > {tmp_path}/late; rm "$QUEUE.before"; {LOST}'
    login.before_queueing(late)
    login.after_queueing(f'[ -f {tmp_path}/late ] && echo "99|$(cat {tmp_path}/late)" >> "$QUEUE"')
    assert login.submit(tmp_path / "run", "new") == 8
    assert login.jobs() == [8] and login.cancelled() == [99]


def test_a_controller_that_is_away_is_waited_for(
    login: ScriptedQueue, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    login.before_queueing(f'rm "$QUEUE.before"; {LOST}')
    assert login.submit(tmp_path / "run", "new") == 8
    assert "that passes; asking again for at most 120 s" in capsys.readouterr().out


def test_a_controller_that_stays_away_leaves_no_trace(
    login: ScriptedQueue, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(queueing, "PATIENCE_S", 0.1)
    login.before_queueing(LOST)
    with pytest.raises(SchedulerError, match="Unable to contact slurm controller"):
        login.submit(tmp_path / "runs/x", "new")
    assert not login.jobs() and not (tmp_path / "runs").exists()


def test_what_a_lost_machine_left_is_replaced(login: ScriptedQueue, tmp_path: Path) -> None:
    """Submission and guard are both gone; the staged files are there, the lock is of a dead process."""
    login.submit(tmp_path / "run", "old")
    login.queue.write_text("")
    leftover = tmp_path / "run/submit.new.0123abcd"
    leftover.mkdir()
    (leftover / "submit.yaml").write_text("half")
    assert in_child(lambda: hold(tmp_path / "run", None, lambda job: None)) == 0
    job_id = login.submit(tmp_path / "run", "new")
    assert files_of(tmp_path / "run") == SUBMITTED and job_of(tmp_path / "run") == job_id


def test_of_simultaneous_submissions_one_is_accepted(login: ScriptedQueue, tmp_path: Path) -> None:
    """To a folder that none of them finds; each with its own configuration."""
    run, children = tmp_path / "runs/x", []
    login.before_queueing("sleep 0.5")
    for number in range(5):
        pid = os.fork()
        if pid == 0:
            os._exit(in_child(partial(login.submit, run, f"mark{number}")))
        children.append(pid)
    statuses = [os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) for pid in children]
    assert sorted(statuses) == [0, 2, 2, 2, 2]
    assert mark_of(run) == f"mark{statuses.index(0)}"
    assert login.jobs() == [job_of(run)] and files_of(run) == SUBMITTED
