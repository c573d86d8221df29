"""What the supervisor makes of who is to blame: nodes to do without, checkpoints to pass over."""

import json
import os
import signal
from pathlib import Path

import pytest

from launch.attempts import Attempts
from launch.history import Attempt
from launch.supervisor import Supervisor
from tests.helpers.recorded_attempt import FACTS
from tests.helpers.scripted_job import WAIT_FOR_USR1, ScriptedJob, send_when


def ended(job: ScriptedJob, rank: int, status: int, **error: object) -> str:
    """Script of ranks of which one ends; there are eight on a node. srun hears of n1 first."""
    line = {
        "event": "end", "rank": rank, "pid": 1, "status": status, "at_s": 1.0, "is_closing": False,
        "error": {**FACTS, **error} if error else None,
    }  # fmt: skip
    file = f"{job.run}/attempts/latest/ends_n{rank // 8 + 1}.jsonl"
    heard = "srun: error: n1: task 0: Exited with exit code 1"
    return f"cat >> {file} <<'END'\n{json.dumps(line)}\nEND\necho '{heard}' >&2; exit 1"


def stalled(job: ScriptedJob, rank: int) -> str:
    """Script of ranks of which one does not answer the watchdog."""
    found = json.dumps({"silent": [rank], "culprits": [], "doing": {}})
    return f"mkdir -p {job.run}/logs; echo '{found}' > {job.run}/logs/stall.json; exit 1"


def history(job: Supervisor) -> list[Attempt]:
    return job.attempts.history()


def test_a_node_that_was_to_blame_twice_is_left_out_and_stays_out(
    job: ScriptedJob, capsys: pytest.CaptureFixture[str]
) -> None:
    """Also when the job goes back to the queue."""
    (job.folder / "others").write_text("n1 idle\nn2 idle\nn3 idle\nn4 idle\n")
    ready = job.folder / "ready"
    job.then(f"step 2; {stalled(job, 8)}")
    job.then(f"step 3; {ended(job, 8, 70)}")
    job.then(WAIT_FOR_USR1.format(ready=ready))
    send_when(ready, signal.SIGUSR1)
    _, supervised = job.supervise(legal_nodes=[3])
    first, second, third = history(supervised)
    assert [attempt.blame and attempt.blame.node for attempt in (first, second)] == ["n2", "n2"]
    assert (first.nodes, second.nodes, third.nodes) == (["n1", "n2", "n3"],) * 2 + (["n1", "n3", "n4"],)
    assert not second.left_out and list(third.left_out) == ["n2"]
    why = "it was to blame in attempts 1, 2; rank 8 on n2 ended with status 0 before training was over"
    assert third.left_out["n2"] == why and f"n2 is left out: {why}" in capsys.readouterr().out
    assert job.calls("scontrol")[-1].endswith("ExcNodeList=n2")
    assert json.loads((job.run / "attempts/3/attempt.json").read_text())["left_out"] == {"n2": why}


def test_a_node_is_to_blame_once_by_accident(job: ScriptedJob) -> None:
    job.then(f"step 2; {stalled(job, 8)}")
    job.then(f"step 3; {ended(job, 16, -9)}")
    job.then("step 20")
    _, supervised = job.supervise(legal_nodes=[3])
    assert [attempt.nodes for attempt in history(supervised)] == [["n1", "n2", "n3"]] * 3


def test_a_node_is_used_again_where_the_run_cannot_go_on_without_it(
    job: ScriptedJob, capsys: pytest.CaptureFixture[str]
) -> None:
    for step in (2, 3):
        job.then(f"step {step}; {stalled(job, 8)}")
    job.then("step 20")
    status, supervised = job.supervise(legal_nodes=[4])
    assert status == 0 and len(history(supervised)[-1].nodes) == 4 and not history(supervised)[-1].left_out
    printed = capsys.readouterr().out
    assert (
        "n2 is used again, since the run cannot go on without it, though it was to blame in attempts"
        in printed
    )


def test_without_the_node_that_was_to_blame_a_step_is_tried_once_more(
    job: ScriptedJob, capsys: pytest.CaptureFixture[str]
) -> None:
    for _ in range(2):
        job.then(f"step 5; {stalled(job, 8)}")
    job.then(f"step 5; {ended(job, 0, -9)}")
    status, supervised = job.supervise(legal_nodes=[3])
    assert status == 1 and history(supervised)[-1].nodes == ["n1", "n3", "n4"]
    assert "GIVEN UP: attempts 2 and 3 both failed after step 5" in capsys.readouterr().out


def test_a_step_that_fails_on_a_node_that_is_needed_is_no_accident(job: ScriptedJob) -> None:
    for _ in range(2):
        job.then(f"step 5; {stalled(job, 8)}")
    status, supervised = job.supervise(legal_nodes=[4])
    assert status == 1 and len(history(supervised)) == 2


def test_the_same_error_of_settings_is_not_tried_a_third_time(
    job: ScriptedJob, capsys: pytest.CaptureFixture[str]
) -> None:
    """Though the first attempt came further: it saved before it ended."""
    error = {"kind": "DataError", "is_shared": True}
    job.then(f"step 6; {ended(job, 0, 2, text='shard_7 is damaged; 7 samples', **error)}")
    job.then(ended(job, 0, 2, text="shard_7 is damaged; 9 samples", **error))
    status, supervised = job.supervise()
    assert status == 1 and len(history(supervised)) == 2
    assert "this is no accident (DataError: shard_7 is damaged; 9 samples)" in capsys.readouterr().out


def checkpoint(job: ScriptedJob, step: int) -> Path:
    folder = job.run / f"checkpoints/step_{step}"
    folder.mkdir(parents=True)
    return folder


def unloadable(job: ScriptedJob, step: int, instead: Path | None) -> str:
    """Script of ranks that cannot load a checkpoint."""
    facts = {"path": str(job.run / f"checkpoints/step_{step}"), "instead": str(instead or "")}
    return ended(job, 0, 2, kind="DamagedCheckpointError", text=f"step_{step}: a file is cut short", **facts)


def test_a_checkpoint_that_does_not_load_is_passed_over_once(
    job: ScriptedJob, capsys: pytest.CaptureFixture[str]
) -> None:
    """Later, with a step in between, another may be."""
    older, newer = checkpoint(job, 4), checkpoint(job, 8)
    (newer / "data").touch()
    (job.run / "checkpoints/step_8.damaged").mkdir()
    job.then(unloadable(job, 8, older))
    job.then(f"step 9; mkdir {newer}; {ended(job, 0, -9)}")
    job.then(unloadable(job, 8, older))
    job.then("step 20")
    status, supervised = job.supervise()
    assert status == 0 and job.outcomes(supervised) == ["failed", "failed", "failed", "finished"]
    assert [attempt.passed_over for attempt in history(supervised)] == ["step_8", "", "step_8", ""]
    assert (job.run / "checkpoints/step_8.damaged.2/data").exists()
    assert sorted(os.listdir(job.run / "checkpoints")) == [
        "step_4", "step_8.damaged", "step_8.damaged.2", "step_8.damaged.3"
    ]  # fmt: skip
    printed = capsys.readouterr().out
    assert (
        f"step_8 does not load and is passed over, once, for step_4; it is kept as {newer}.damaged.2"
        in printed
    )
    assert "attempt 1: no node is to blame (checkpoint): the checkpoint" in printed


def test_two_checkpoints_that_do_not_load_end_the_run(
    job: ScriptedJob, capsys: pytest.CaptureFixture[str]
) -> None:
    oldest, older, newer = (checkpoint(job, step) for step in (2, 4, 8))
    job.then(unloadable(job, 8, oldest))
    job.then(unloadable(job, 4, oldest))
    status, supervised = job.supervise()
    assert status == 1 and older.exists() and oldest.exists() and not newer.exists()
    assert [attempt.passed_over for attempt in history(supervised)] == ["step_8", ""]
    assert f"GIVEN UP: neither step_8 nor {older} loads" in capsys.readouterr().out


@pytest.mark.parametrize("instead", ["", "elsewhere"])
def test_the_only_checkpoint_stays_where_it_is(
    job: ScriptedJob, capsys: pytest.CaptureFixture[str], instead: str
) -> None:
    """The run would start from scratch without a word. Nor is anything moved that is not its checkpoint."""
    only = checkpoint(job, 8)
    (job.run / "checkpoints/aside/step_8").mkdir(parents=True)
    script = unloadable(job, 8, only if instead else None)
    job.then(
        script.replace(f"{job.run}/checkpoints/step_8", f"{job.run}/checkpoints/aside/step_8", bool(instead))
    )
    status, supervised = job.supervise()
    assert status == 1 and only.exists() and len(history(supervised)) == 1
    assert (job.run / "checkpoints/aside/step_8").exists()
    assert "GIVEN UP: the checkpoint" in capsys.readouterr().out


def test_a_checkpoint_that_cannot_be_set_aside_ends_the_run(
    job: ScriptedJob, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    older, newer = checkpoint(job, 4), checkpoint(job, 8)

    def refuse(path: Path) -> Path:
        raise PermissionError(13, "Permission denied", str(path))

    monkeypatch.setattr("launch.aftermath.set_aside", refuse)
    job.then(unloadable(job, 8, older))
    status, _ = job.supervise()
    assert status == 1 and newer.exists()
    assert "could not be set aside" in capsys.readouterr().out


def test_records_of_earlier_versions_are_read(tmp_path: Path) -> None:
    attempts = Attempts(tmp_path)
    attempts.start(7, ["n1", "n2"], "abc")
    path = tmp_path / "attempts/1/attempt.json"
    values = json.loads(path.read_text())
    added = ("blame", "left_out", "passed_over")
    old = {name: value for name, value in values.items() if name not in added}
    path.write_text(json.dumps(old | {"outcome": "failed", "first_to_fail": "n2"}))
    (found,) = attempts.history()
    assert (found.blame, found.left_out, found.passed_over) == (None, {}, "")
    attempts.write(found)
    assert attempts.history() == [found]
