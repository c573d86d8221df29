"""A run folder that is full or away is waited for: by all that the supervisor does, and before any start."""

import dataclasses
import errno
import os
import shutil
import signal
import threading
from collections.abc import Callable
from pathlib import Path

import pytest

from launch import patience
from launch.attempts import Attempts
from launch.history import Attempt, Outcome
from launch.patience import Patience, UnwritableError, check_room, found_no_room, remove_partials
from launch.restart_policy import MAX_NO_ROOM, reason_to_give_up, wait_before_restart_s
from launch.room import RunFolderRoom
from launch.submission import write_atomically
from tests.helpers.scripted_job import ScriptedJob, send_when
from tests.helpers.written_checkpoints import write_checkpoint

PASSING = (errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EIO, errno.ESTALE, errno.EACCES, errno.ETIMEDOUT)


@pytest.fixture(autouse=True)
def _quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(patience, "RETRY_S", 0.01)
    monkeypatch.setattr(patience, "LONGEST_RETRY_S", 0.05)
    monkeypatch.setattr("launch.comment.SHORTEST_S", 0.05)


def failing(number: int, times: int) -> Callable[[], str]:
    """An action that fails so many times."""
    left = [times]

    def action() -> str:
        if left[0]:
            left[0] -= 1
            raise OSError(number, os.strerror(number), "/runs/x/attempts/1/attempt.json")
        return "done"

    return action


@pytest.mark.parametrize("number", PASSING)
def test_what_passes_is_waited_for_and_told(number: int, tmp_path: Path) -> None:
    told: list[str] = []
    assert Patience(tmp_path, 60, tell=told.append).of(failing(number, 3)) == "done"
    waiting, works = told
    assert waiting.startswith("waiting for the run folder, for 0 s so far: /runs/x/attempts/1/attempt.json: ")
    assert errno.errorcode[number] in waiting and "works again" in works


@pytest.mark.parametrize("number", [errno.ENAMETOOLONG, errno.ELOOP, errno.ENOTDIR])
def test_what_stays_is_not_waited_for(number: int, tmp_path: Path) -> None:
    with pytest.raises(OSError) as raised:
        Patience(tmp_path, 60).of(failing(number, 3))
    assert raised.value.errno == number


def test_a_folder_that_is_gone_is_not_waited_for_as_long(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(patience, "GONE_S", 0.05)
    with pytest.raises(UnwritableError, match=r"No such file .* \[ENOENT\], for 0 s: make room"):
        Patience(tmp_path, 60, tell=lambda text: None).of(failing(errno.ENOENT, 10**9))


def test_a_stop_request_ends_the_waiting(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(patience, "STOPPED_S", 0.1)
    is_stopped = threading.Event()
    threading.Timer(0.1, is_stopped.set).start()
    with pytest.raises(UnwritableError):
        Patience(tmp_path, 60, is_stopped.is_set, tell=lambda text: None).of(failing(errno.EIO, 10**9))


def test_a_full_disk_loses_what_no_rank_completed(tmp_path: Path) -> None:
    """Links go, not what they lead to; nothing else goes, whatever it is called."""
    root, elsewhere = tmp_path / "checkpoints", tmp_path / "elsewhere"
    whole = write_checkpoint(root, 10)
    kept = ("my.partial", "step_x.partial", "step_5.unsound")
    for name in ("step_20.partial", "step_9.unsound.partial", "step_4.0123abcd.partial", *kept):
        (root / name).mkdir()
        (root / name / "data").write_bytes(b"x")
    elsewhere.mkdir()
    (elsewhere / "data").write_bytes(b"x")
    (root / "step_30.partial").symlink_to(elsewhere)
    Patience(tmp_path, 60, tell=lambda text: None).of(failing(errno.ENOSPC, 1))
    names = {path.name for path in root.iterdir()}
    assert names == {whole.name, "latest", *kept}
    assert (elsewhere / "data").exists()
    remove_partials(tmp_path / "no such run")


def test_a_record_that_does_not_fit_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "attempt.json").write_text("before")

    def half(path: Path, text: str, **_options: object) -> None:
        path.write_bytes(text.encode()[:3])
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(Path, "write_text", half)
    with pytest.raises(OSError, match="No space"):
        write_atomically(tmp_path / "attempt.json", "after")
    assert [path.name for path in tmp_path.iterdir()] == ["attempt.json"]
    assert (tmp_path / "attempt.json").read_text() == "before"


def test_what_could_not_be_written_is_kept_and_written_later(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(patience, "STOPPED_S", 0.0)
    told: list[str] = []
    attempts = Attempts(tmp_path, Patience(tmp_path, 60, lambda: True, told.append))
    first = attempts.start(7, ["n1"], "abc")
    with monkeypatch.context() as full:
        full.setattr("launch.attempts.write_atomically", lambda *_: failing(errno.ENOSPC, 1)())
        attempts.write(dataclasses.replace(first, outcome=Outcome.failed, reached=3))
    assert "the record of attempt 1 could not be written" in told[-1]
    assert attempts.history()[0].outcome == "failed"
    assert Attempts(tmp_path).history()[0].outcome is None
    second = attempts.start(7, ["n1"], "abc")
    attempts.write(dataclasses.replace(second, outcome=Outcome.finished))
    assert [attempt.outcome for attempt in Attempts(tmp_path).history()] == ["failed", "finished"]


def test_a_start_that_is_tried_again_leaves_no_attempt(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A full disk may take the folder, and not the record; it may stay full for a day."""
    refuse, write = failing(errno.ENOSPC, 3), write_atomically

    def write_later(path: Path, text: str) -> None:
        refuse()
        write(path, text)

    monkeypatch.setattr("launch.attempts.write_atomically", write_later)
    attempts = Attempts(tmp_path, Patience(tmp_path, 60, tell=lambda text: None))
    assert attempts.start(7, ["n1"], "abc").number == 1
    assert {path.name for path in attempts.root.iterdir()} == {"1", "latest"}


def test_records_of_attempts_that_somebody_deleted_are_written_again(tmp_path: Path) -> None:
    """But not to a folder that is gone: a mount point would get it."""
    run = tmp_path / "mount/run"
    run.mkdir(parents=True)
    attempts = Attempts(run)
    first = attempts.start(7, ["n1"], "abc")
    shutil.rmtree(run / "attempts")
    attempts.write(dataclasses.replace(first, outcome=Outcome.failed))
    assert Attempts(run).history()[0].outcome == "failed"
    run.rename(tmp_path / "elsewhere")
    for action in (lambda: attempts.write(first), lambda: attempts.start(7, ["n1"], "abc")):
        with pytest.raises(FileNotFoundError):
            action()
    assert not list((tmp_path / "mount").iterdir())


def test_a_full_disk_excludes_no_node(job: ScriptedJob, monkeypatch: pytest.MonkeyPatch) -> None:
    """A preflight that could not write its report would otherwise cost the first node, which writes it."""
    disk = Disk(job.folder / "full", monkeypatch)
    job.then_check(status=1)
    (job.folder / "check_1").write_text(f"touch {disk.mark}; exit 1")
    job.then_check()
    job.then("step 20")

    def clear() -> None:
        while not any("waiting" in call for call in job.calls("comment")):
            threading.Event().wait(0.02)
        disk.mark.unlink()

    threading.Thread(target=clear, daemon=True).start()
    status, supervised = job.supervise(checkpoint_bytes=1000, preflight=True)
    assert status == 0 and job.outcomes(supervised) == ["no_room", "finished"]
    assert not supervised.unfit


def test_room_is_looked_at_by_writing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    check_room(tmp_path, 1)
    assert not list(tmp_path.iterdir())
    with pytest.raises(OSError, match=r"bytes are free, a checkpoint takes 1,000,000,000,000,000,000"):
        check_room(tmp_path, 10**18)
    monkeypatch.setattr(os, "fsync", lambda _: failing(errno.EDQUOT, 1)())
    with pytest.raises(OSError) as raised:
        check_room(tmp_path, 1)
    assert raised.value.errno == errno.EDQUOT and not list(tmp_path.iterdir())


LOGS = {
    "CheckpointError: /runs/x/checkpoints/step_6.partial: could not be written ([Errno 28] No space)": True,
    "CheckpointError: /runs/x/checkpoints/step_6.partial: … (rank 3: [Errno 122] Disk quota exceeded)": True,
    "MachineError: /runs/x/trace: No space left on device [ENOSPC]": True,
    "MachineError: /data/shard_1.tar: Input/output error [EIO]": False,
    "MachineError: /tmp/torchelastic_1: No space left on device [ENOSPC]": False,
    "RuntimeError: step 28 failed in /runs/x": False,
}


@pytest.mark.parametrize("line", LOGS)
def test_ranks_that_found_no_room_are_recognized(line: str) -> None:
    found = found_no_room(f"step 1\n{line}\nstep 2\n", Path("/runs/x"))
    assert found == (line if LOGS[line] else "")


def without_room(number: int) -> Attempt:
    """An attempt that found no room, at the same step as all others."""
    return Attempt(
        number=number, job_id=7, nodes=["n1"], code="abc", outcome=Outcome.no_room, reached=5, saved=0
    )


def test_want_of_room_is_waited_out_but_not_for_ever() -> None:
    history = [without_room(number) for number in range(1, MAX_NO_ROOM + 1)]
    assert reason_to_give_up(history, max_restarts=0) is None
    assert wait_before_restart_s(history[:1], 5) == 5 and wait_before_restart_s(history[:3], 5) == 20
    assert wait_before_restart_s(history, 5) == 900
    reason = reason_to_give_up([*history, without_room(MAX_NO_ROOM + 1)], max_restarts=0)
    assert reason is not None and "no room for a checkpoint in 51 attempts in a row: make room" in reason


class Disk:
    """A disk that is full while a file is there."""

    def __init__(self, mark: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        self.mark = mark
        real = shutil.disk_usage
        monkeypatch.setattr(
            shutil,
            "disk_usage",
            lambda path: real(path)._replace(free=0) if mark.exists() else real(path),
        )


def test_a_full_disk_costs_an_attempt_and_not_the_job(
    job: ScriptedJob, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Twice at the same step, which would otherwise end the run; the job's comment says why it waits."""
    disk = Disk(job.folder / "full", monkeypatch)
    for _ in range(2):
        job.then(f"step 5; touch {disk.mark}; exit 1")
    job.then("step 20")

    def clear() -> None:
        for number in range(1, 3):
            while sum("waiting for the run folder" in call for call in job.calls("comment")) < number:
                threading.Event().wait(0.02)
            disk.mark.unlink()

    threading.Thread(target=clear, daemon=True).start()
    status, supervised = job.supervise(checkpoint_bytes=1000)
    assert status == 0 and job.outcomes(supervised) == ["no_room", "no_room", "finished"]
    reason = supervised.attempts.history()[0].reason
    assert "0 bytes are free, a checkpoint takes 1,000" in reason
    assert "works again" in capsys.readouterr().out


def test_a_stop_request_while_it_waits_requeues_the_job(
    job: ScriptedJob, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(patience, "STOPPED_S", 0.1)
    disk = Disk(job.folder / "full", monkeypatch)
    disk.mark.touch()
    job.then("step 20")
    # Once the comment says that it waits.
    send_when(job.folder / "comment.calls", signal.SIGUSR1)
    status, _ = job.supervise(checkpoint_bytes=1000)
    assert status == 0 and "requeue 7" in job.calls("scontrol") and not job.calls("srun")
    assert "goes back to the queue" in job.calls("comment")[-1]


def test_preflight_finds_the_room_that_it_wants(job: ScriptedJob) -> None:
    """Otherwise a full disk would fail it on every node, which is given up."""
    job.then("step 20")
    _, supervised = job.supervise(checkpoint_bytes=1000, max_checkpoints=4)
    room: RunFolderRoom = supervised.room
    assert room.missing_bytes() == 1000
    (job.run / "checkpoints").mkdir()
    (job.run / "checkpoints/data").write_bytes(bytes(2500))
    room.submission = dataclasses.replace(room.submission, preflight=True)
    assert room.missing_bytes() == 1500
    (job.run / "checkpoints/more").write_bytes(bytes(1000))
    assert room.missing_bytes() == 1000
