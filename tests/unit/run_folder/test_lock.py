"""One job or process per run folder, whichever is first, whatever earlier ones left behind."""

import json
import os
import socket
import subprocess
import sys
import threading
from dataclasses import replace
from pathlib import Path

import pytest

from k25_train.run_folder import heartbeat, lock
from k25_train.run_folder.held import HeldFolder, hold
from k25_train.run_folder.jobs import SchedulerError
from k25_train.run_folder.lock import acquire, claim_of, current, release, take
from k25_train.run_folder.process import Liveness, Process, liveness, this_process
from k25_train.run_folder.record import LOCK, Holder, LockedError, new_holder
from tests.helpers.project_sources import REPO

HERE = this_process()
DEAD = replace(HERE, started_ticks=HERE.started_ticks - 1)
"""A process of this machine whose id another one has now."""
ELSEWHERE = replace(HERE, host="n9", boot_id="another boot", pid=12345)


def states(**by_job: str) -> "dict[int, str]":
    """Job states by id, from keywords such as j7="RUNNING"."""
    return {int(name[1:]): state for name, state in by_job.items()}


def no_slurm(job_id: int) -> str | None:
    """A machine without SLURM's commands."""
    raise SchedulerError("squeue is not on PATH")


def leave(run: Path, process: Process | None, job_id: int | None = None) -> Holder:
    """A lock as a holder leaves it."""
    run.mkdir(exist_ok=True)
    left = new_holder(job_id, process)
    (run / LOCK).write_text(left.to_json())
    return left


def job_of(run: Path) -> int | None:
    """The job that holds the folder."""
    holder = current(run)
    return None if holder is None else holder.job_id


@pytest.fixture(autouse=True)
def short_watch(monkeypatch: pytest.MonkeyPatch) -> None:
    """Seconds are tenths of seconds."""
    monkeypatch.setattr(heartbeat, "WATCH_S", 0.4)
    monkeypatch.setattr(heartbeat, "BEAT_S", 0.05)


def test_the_first_job_gets_the_folder_and_keeps_it_over_a_requeue(tmp_path: Path) -> None:
    acquire(tmp_path, 7, states(j7="RUNNING").get)
    acquire(tmp_path, 7, states(j7="RUNNING").get)
    assert job_of(tmp_path) == 7


@pytest.mark.parametrize("state", ["RUNNING", "PENDING", "SUSPENDED", "COMPLETING", "REQUEUED"])
def test_a_job_that_may_write_keeps_others_out(tmp_path: Path, state: str) -> None:
    acquire(tmp_path, 7, states().get)
    expected = f"belongs to job 7, which is {state}: follow that job, end it with `scancel 7`"
    with pytest.raises(LockedError, match=expected):
        acquire(tmp_path, 8, states(j7=state).get)
    with pytest.raises(LockedError, match=expected):
        hold(tmp_path, None, states(j7=state).get)
    assert job_of(tmp_path) == 7


@pytest.mark.parametrize("state", ["CANCELLED", "NODE_FAIL", "TIMEOUT", None])
def test_what_a_job_left_behind_is_taken(tmp_path: Path, state: str | None) -> None:
    acquire(tmp_path, 7, states().get)
    acquire(tmp_path, 8, lambda _job: state)
    assert job_of(tmp_path) == 8
    assert [path.name for path in tmp_path.iterdir()] == [LOCK]


def test_the_lock_of_an_earlier_version_is_read(tmp_path: Path) -> None:
    (tmp_path / LOCK).write_text('{"job_id": 7}\n')
    with pytest.raises(LockedError, match="belongs to job 7, which is RUNNING"):
        acquire(tmp_path, 8, states(j7="RUNNING").get)
    acquire(tmp_path, 8, states().get)
    assert job_of(tmp_path) == 8


def test_release_gives_back_only_what_is_ones_own(tmp_path: Path) -> None:
    release(tmp_path, 7)
    acquire(tmp_path, 7, states().get)
    release(tmp_path, 8)
    assert job_of(tmp_path) == 7
    release(tmp_path, 7)
    assert current(tmp_path) is None


def test_ranks_of_the_job_have_its_folder_and_give_it_back(tmp_path: Path) -> None:
    acquire(tmp_path, 7, states().get)
    held = hold(tmp_path, 7, no_slurm)
    assert held.holder.job_id == 7 and held.holder.process == HERE
    held.check()
    # The supervisor, requeued, finds what it had; another job does not get it.
    acquire(tmp_path, 7, no_slurm)
    held.check()
    # Nobody is told to kill a rank, after which the job would go back to the queue.
    told = str(lock.in_use(tmp_path, held.holder))
    assert f"belongs to job 7, in which it is in use by process {HERE.pid}" in told
    assert "scancel 7" in told and "kill" not in told
    held.close()
    after = current(tmp_path)
    assert after is not None and (after.job_id, after.process) == (7, None)
    held = hold(tmp_path, 7, no_slurm)
    release(tmp_path, 7)
    held.close()
    assert list(tmp_path.iterdir()) == []


def test_a_second_process_is_told_who_holds_the_folder(tmp_path: Path) -> None:
    """Also one of the same job, and through another path; the first lives on."""
    script = f"""
import sys; from pathlib import Path; from k25_train.run_folder.held import hold
held = hold(Path({str(tmp_path)!r}), None, lambda job: None); print("held", flush=True); sys.stdin.read()
"""
    first = subprocess.Popen(
        [sys.executable, "-c", script], cwd=REPO, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    assert first.stdin is not None and first.stdout is not None
    try:
        assert first.stdout.readline() == "held\n"
        link = tmp_path.with_name("link")
        link.symlink_to(tmp_path)
        who = f"in use by process {first.pid} on {socket.gethostname()} of .*, since 2.*kill {first.pid}"
        for path, job in ((tmp_path, None), (link, 7), (tmp_path / ".." / tmp_path.name, None)):
            with pytest.raises(LockedError, match=who):
                hold(path, job, no_slurm)
        with pytest.raises(LockedError, match=who):
            acquire(tmp_path, 7, states().get)
    finally:
        first.stdin.close()
        first.wait()
        first.stdout.close()
    # It released it although nothing asked it to.
    assert not (tmp_path / LOCK).exists()


@pytest.mark.parametrize(
    "process",
    [DEAD, replace(HERE, pid=2**22 + 1), replace(HERE, boot_id="before"), ELSEWHERE],
    ids=["its id is used again", "gone", "rebooted", "of another machine"],
)
def test_what_a_dead_process_left_behind_is_taken(tmp_path: Path, process: Process) -> None:
    leave(tmp_path, process)
    held = hold(tmp_path, None, no_slurm)
    held.check()
    held.close()
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    "process",
    [ELSEWHERE, replace(HERE, pid_namespace="pid:[1]"), replace(HERE, boot_id="")],
    ids=["another machine", "a container", "unknown"],
)
def test_a_process_that_cannot_be_looked_up_is_watched(
    tmp_path: Path, process: Process, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    assert liveness(process) is Liveness.unknown
    left = leave(tmp_path, process)
    # Its clock is years behind.
    os.utime(tmp_path / LOCK, (1.0, 1.0))
    monkeypatch.setattr(heartbeat, "WATCH_S", 20.0)
    timer = threading.Timer(0.2, os.utime, (tmp_path / LOCK, (3.0, 3.0)))
    timer.start()
    with pytest.raises(LockedError, match=f"in use by process {process.pid} on {process.host}"):
        hold(tmp_path, None, no_slurm)
    timer.join()
    assert current(tmp_path) == left
    assert "watching whether it still lives, 0 of at most 20 s" in capsys.readouterr().out
    # Where its flock is seen, there is no need to watch.
    living = heartbeat.Heartbeat(tmp_path / LOCK)
    assert heartbeat.is_flocked(tmp_path / LOCK)
    living.close()
    assert not heartbeat.is_flocked(tmp_path / LOCK)


def test_the_holder_shows_signs_of_life(tmp_path: Path) -> None:
    held = hold(tmp_path, None, no_slurm)
    os.utime(tmp_path / LOCK, (1.0, 1.0))
    before = heartbeat._stamp(tmp_path / LOCK)
    assert heartbeat.is_renewed(tmp_path / LOCK, "it", print)
    held.close()
    assert before is not None and not heartbeat.is_renewed(tmp_path / LOCK, "it", print)


def test_a_process_that_died_while_taking_a_lock_is_no_obstacle(tmp_path: Path) -> None:
    """Nor are several of them, nor what they left."""
    left = leave(tmp_path, DEAD)
    claimed = replace(new_holder(None, DEAD), command="second")
    claim_of(tmp_path, left).write_text(claimed.to_json())
    assert current(tmp_path) == claimed
    held = hold(tmp_path, None, no_slurm)
    held.check()
    held.close()
    assert list(tmp_path.iterdir()) == []


def test_what_others_left_while_they_took_the_lock_goes_if_they_are_dead(tmp_path: Path) -> None:
    kept, gone = {"living", "elsewhere"}, {"dead", "old", "claimed", "empty"}
    (tmp_path / f"{LOCK}.new.living").write_text(new_holder(None, HERE).to_json())
    (tmp_path / f"{LOCK}.new.elsewhere").write_text(new_holder(None, ELSEWHERE).to_json())
    (tmp_path / f"{LOCK}.new.empty").touch()
    (tmp_path / f"{LOCK}.new.dead").write_text(new_holder(None, DEAD).to_json())
    (tmp_path / f"{LOCK}.new.old").write_text(new_holder(7, None).to_json())
    os.utime(tmp_path / f"{LOCK}.new.old", (0, 0))
    (tmp_path / f"{LOCK}.claim.claimed").write_text(new_holder(None, HERE).to_json())
    leave(tmp_path, DEAD)
    held = hold(tmp_path, None, no_slurm)
    left = {path.suffix[1:] for path in tmp_path.glob(f"{LOCK}.*")}
    assert (left, left & gone) == (kept, set())
    held.check()
    held.close()


def test_a_lock_that_is_being_taken_counts(tmp_path: Path) -> None:
    left = leave(tmp_path, DEAD)
    claim_of(tmp_path, left).write_text(new_holder(8, None).to_json())
    with pytest.raises(LockedError, match="belongs to job 8, which is RUNNING"):
        hold(tmp_path, None, states(j8="RUNNING").get)


@pytest.mark.parametrize(
    "text", ["", "{", "null", "[7]", '{"format_version": 3, "id": "x"}', '{"job_id": "x"}']
)
def test_a_damaged_lock_is_named(tmp_path: Path, text: str) -> None:
    (tmp_path / LOCK).write_text(text)
    with pytest.raises(LockedError, match=r"lock\.json: is damaged, so it cannot tell who holds"):
        hold(tmp_path, None, no_slurm)
    assert (tmp_path / LOCK).read_text() == text


def test_a_lock_that_leads_nowhere_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lock, "RETRY_S", 0.0)
    (tmp_path / LOCK).symlink_to("nowhere")
    with pytest.raises(LockedError, match="cannot be taken or read"):
        hold(tmp_path, None, no_slurm)


def test_a_job_that_slurm_cannot_be_asked_about_keeps_the_folder(tmp_path: Path) -> None:
    acquire(tmp_path, 7, states().get)
    with pytest.raises(LockedError, match=r"belongs to SLURM's job 7, and SLURM cannot be asked"):
        hold(tmp_path, None, no_slurm)


def deleted(held: HeldFolder) -> None:
    (held.run / LOCK).unlink()


def stolen(held: HeldFolder) -> None:
    (held.run / LOCK).write_text(new_holder(None, ELSEWHERE).to_json())


def claimed(held: HeldFolder) -> None:
    claim_of(held.run, held.holder).write_text(new_holder(None, ELSEWHERE).to_json())


def emptied(held: HeldFolder) -> None:
    (held.run / LOCK).write_text("")


def moved(held: HeldFolder) -> None:
    held.run.rename(held.run.with_name("moved"))


@pytest.mark.parametrize(
    ("lose", "expected"),
    [
        (deleted, r"lock\.json was deleted or moved"),
        (stolen, "was taken over by process 12345 on n9"),
        (claimed, "was taken over by process 12345 on n9"),
        (emptied, "cannot be read"),
        (moved, "run was deleted or moved"),
    ],
)
def test_who_has_lost_the_folder_notices(
    tmp_path: Path, lose: object, expected: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("k25_train.run_folder.held.PAUSE_S", 0.01)
    monkeypatch.setattr("k25_train.run_folder.lock.EMPTY_S", 0.01)
    run = tmp_path / "run"
    run.mkdir()
    held = hold(run, None, no_slurm)
    held.check()
    assert callable(lose)
    lose(held)
    with pytest.raises(LockedError, match=f"{expected}.*Nothing more is written"):
        held.check()
    left = sorted(path.name for path in run.iterdir()) if run.exists() else []
    held.close()
    assert left == (sorted(path.name for path in run.iterdir()) if run.exists() else [])


def test_where_there_are_no_hard_links_one_gets_it_too(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def no_link(source: Path, target: Path) -> None:
        raise PermissionError(1, "Operation not permitted")

    monkeypatch.setattr(os, "link", no_link)
    leave(tmp_path, DEAD)
    acquire(tmp_path, 7, no_slurm)
    with pytest.raises(LockedError, match="belongs to job 7"):
        acquire(tmp_path, 8, states(j7="RUNNING").get)
    assert [path.name for path in tmp_path.iterdir()] == [LOCK]


def test_a_claim_that_goes_while_it_is_looked_at_is_tried_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whoever made it was not faster after all, and took it away between the two looks."""
    link, refused = os.link, []

    def taken_at_first(source: Path, target: Path) -> None:
        if not refused:
            refused.append(target)
            raise FileExistsError(17, "File exists")
        link(source, target)

    leave(tmp_path, DEAD)
    monkeypatch.setattr(os, "link", taken_at_first)
    acquire(tmp_path, 7, no_slurm)
    assert refused and job_of(tmp_path) == 7


@pytest.mark.parametrize("left_behind", [True, False])
def test_of_many_jobs_at_once_one_gets_it(tmp_path: Path, left_behind: bool) -> None:
    """Also where all find the same lock of a job that is gone."""
    for turn in range(12):
        folder = tmp_path / str(turn)
        folder.mkdir()
        if left_behind:
            acquire(folder, 1, states().get)
        won: list[int] = []

        def compete(job: int, folder: Path = folder, won: list[int] = won) -> None:
            try:
                take(folder, new_holder(job, None), job, lambda other: None if other == 1 else "RUNNING")
            except LockedError:
                return
            won.append(job)

        threads = [threading.Thread(target=compete, args=(job,)) for job in range(2, 8)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert [job_of(folder)] == won


RACE = """
import json, os, sys
from pathlib import Path
from k25_train.run_folder.held import hold
from k25_train.run_folder.record import LockedError
run, (gate, start), (told, tell), (end, over) = Path(sys.argv[1]), os.pipe(), os.pipe(), os.pipe()
for _ in range(10):
    if os.fork() == 0:
        os.close(start), os.close(over)
        os.read(gate, 1)
        try:
            hold(run, None, lambda job: None)
            os.write(tell, b"w")
        except LockedError:
            os.write(tell, b"l")
        os.read(end, 1)
        os._exit(0)
os.close(start)
print("".join(os.read(told, 1).decode() for _ in range(10)))
os.close(over)
"""


@pytest.mark.parametrize("left_behind", [True, False])
def test_of_ten_processes_at_once_one_gets_it(tmp_path: Path, left_behind: bool) -> None:
    for turn in range(3):
        folder = tmp_path / str(turn)
        folder.mkdir()
        if left_behind:
            leave(folder, DEAD)
        printed = subprocess.run(
            [sys.executable, "-c", RACE, folder], cwd=REPO, capture_output=True, text=True, check=True
        )
        assert sorted(printed.stdout.strip()) == ["l"] * 9 + ["w"]
        # Killed, they left the lock; a newcomer gets it at once.
        assert json.loads((folder / LOCK).read_text())["job_id"] is None
        hold(folder, None, no_slurm).close()
