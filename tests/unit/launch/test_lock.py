"""One job per run folder, whichever is first, whatever earlier jobs left behind."""

import json
import threading
from pathlib import Path

import pytest

from launch.lock import LockedError, acquire, check_free, holder, release


def states(**by_job: str) -> "dict[int, str]":
    """Job states by id, from keywords such as j7="RUNNING"."""
    return {int(name[1:]): state for name, state in by_job.items()}


def test_the_first_job_gets_the_folder_and_keeps_it_over_a_requeue(tmp_path: Path) -> None:
    acquire(tmp_path, 7, states(j7="RUNNING").get)
    acquire(tmp_path, 7, states(j7="RUNNING").get)
    assert holder(tmp_path) == 7


@pytest.mark.parametrize("state", ["RUNNING", "PENDING", "SUSPENDED", "COMPLETING", "REQUEUED"])
def test_a_job_that_may_write_keeps_others_out(tmp_path: Path, state: str) -> None:
    acquire(tmp_path, 7, states().get)
    expected = f"belongs to job 7, which is {state}: follow that job, end it with `scancel 7`"
    with pytest.raises(LockedError, match=expected):
        acquire(tmp_path, 8, states(j7=state).get)
    with pytest.raises(LockedError, match=expected):
        check_free(tmp_path, states(j7=state).get)
    assert holder(tmp_path) == 7


@pytest.mark.parametrize("state", ["CANCELLED", "NODE_FAIL", "TIMEOUT", None])
def test_what_a_job_left_behind_is_taken(tmp_path: Path, state: str | None) -> None:
    acquire(tmp_path, 7, states().get)
    check_free(tmp_path, lambda _job: state)
    acquire(tmp_path, 8, lambda _job: state)
    assert holder(tmp_path) == 8
    assert sorted(path.name for path in tmp_path.iterdir()) == ["lock.json"]


def test_release_gives_back_only_what_is_ones_own(tmp_path: Path) -> None:
    release(tmp_path, 7)
    acquire(tmp_path, 7, states().get)
    release(tmp_path, 8)
    assert holder(tmp_path) == 7
    release(tmp_path, 7)
    assert holder(tmp_path) is None


def test_a_claim_that_a_killed_job_left_is_named(tmp_path: Path) -> None:
    acquire(tmp_path, 7, states().get)
    (tmp_path / "lock.json.claim").write_text(json.dumps({"job_id": 6}))
    with pytest.raises(LockedError, match=r"delete .*lock\.json\.claim and submit again"):
        acquire(tmp_path, 8, states().get)


@pytest.mark.parametrize("left_behind", [True, False])
def test_of_many_at_once_one_gets_it(tmp_path: Path, left_behind: bool) -> None:
    """Also where all find the same lock of a job that is gone."""
    for turn in range(50):
        folder = tmp_path / str(turn)
        folder.mkdir()
        if left_behind:
            acquire(folder, 1, states().get)
        won: list[int] = []

        def compete(job: int, folder: Path = folder, won: list[int] = won) -> None:
            try:
                acquire(folder, job, lambda other: None if other == 1 else "RUNNING")
            except LockedError:
                return
            won.append(job)

        threads = [threading.Thread(target=compete, args=(job,)) for job in range(2, 8)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert [holder(folder)] == won
