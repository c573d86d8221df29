"""In which state a run is, whatever its folder and SLURM say."""

import json
import os
from collections.abc import Callable
from pathlib import Path

import pytest

from launch.status import prometheus, table
from launch.status.judging import State
from launch.status.queue import Queue
from launch.status.report import RunStatus, status_of
from tests.helpers.run_folders import JOB, NOW_S, RunFolder, queue_with

FORGOTTEN, UNTOLD = Queue(jobs={}), Queue(jobs={}, trouble="squeue is not on PATH")
DEAD_PID = 2**22 + 5
GIVEN_UP = "GIVEN UP: attempts 1 and 2 both failed after step 5: no accident. The first errors are in x"


def queued(run: RunFolder) -> Queue:
    run.submitted().locked(JOB, process=False)
    return queue_with("PENDING", "Resources")


def requeued(run: RunFolder) -> Queue:
    run.submitted().steps(1, 5, 99).locked(JOB, process=False)
    run.attempt(1, outcome="stopped", reached=5, reason="at step 5 of 100, requested by SIGUSR1")
    return queue_with("PENDING", "BeginTime")


def checked(run: RunFolder) -> Queue:
    run.submitted().steps(1, 5, 99).locked(JOB, process=False).attempt(1)
    return queue_with("RUNNING")


def starting(run: RunFolder) -> Queue:
    folder = run.submitted().steps(1, 5, 99).locked(JOB).attempt(1)
    (folder / "rank_0.log").write_text("imports\n")
    return queue_with("RUNNING")


def training(run: RunFolder) -> Queue:
    run.submitted().steps(1, 5).locked(JOB).attempt(1)
    return queue_with("RUNNING")


def training_seen_from_elsewhere(run: RunFolder) -> Queue:
    """No squeue there, but the lock is renewed."""
    training(run)
    return UNTOLD


def training_by_hand(run: RunFolder) -> Queue:
    run.steps(1, 5).locked()
    return UNTOLD


def resuming_by_hand(run: RunFolder) -> Queue:
    """The metrics are of days ago."""
    run.steps(1, 5, 99_999).locked()
    return UNTOLD


def saving(run: RunFolder) -> Queue:
    run.submitted().steps(1, 20, 300).locked(JOB).attempt(1, 999)
    (run.folder / "checkpoints/step_20.partial").mkdir(parents=True)
    return queue_with("RUNNING")


def starting_after_a_save_was_cut_off(run: RunFolder) -> Queue:
    """What the attempt before left is not being written."""
    run.submitted().steps(1, 20, 300).locked(JOB).attempt(1, 200, outcome="failed", reached=20)
    partial = run.folder / "checkpoints/step_20.partial"
    partial.mkdir(parents=True)
    os.utime(partial, (NOW_S - 290, NOW_S - 290))
    (run.attempt(2, 30) / "rank_0.log").touch()
    return queue_with("RUNNING")


def stalled(run: RunFolder) -> Queue:
    run.submitted().steps(1, 20, 500).locked(JOB).attempt(1, 999)
    return queue_with("RUNNING")


def slow_but_well(run: RunFolder) -> Queue:
    """A step takes 100 s."""
    run.submitted().steps(1, 20, 500, step_s=100).locked(JOB).attempt(1, 9999)
    return queue_with("RUNNING")


def between(run: RunFolder) -> Queue:
    run.submitted().steps(1, 5).locked(JOB, process=False).attempt(1, outcome="failed", reached=5)
    run.says("attempt 1 failed: …", "waiting for the run folder, for 300 s so far: /r: No space left")
    return queue_with("RUNNING")


def finished(run: RunFolder) -> Queue:
    run.submitted().steps(1, 100).saved(80, 100).attempt(1, outcome="finished", reached=100)
    return FORGOTTEN


def stopped(run: RunFolder) -> Queue:
    run.submitted().steps(1, 5).attempt(1, outcome="stopped", reached=5, reason="at step 5 of 100, requested")
    return FORGOTTEN


def stopped_by_hand(run: RunFolder) -> Queue:
    run.steps(1, 5).saved(5)
    return UNTOLD


def cancelled(run: RunFolder) -> Queue:
    run.submitted().steps(1, 5).locked(JOB, process=False).attempt(1)
    return queue_with("CANCELLED")


def given_up(run: RunFolder) -> Queue:
    for number in (1, 2):
        run.attempt(number, outcome="failed", reached=5)
    run.submitted().steps(1, 5).locked(JOB, process=False)
    run.says("attempt 2 starts on n1, n2; logs in x", GIVEN_UP)
    return queue_with("FAILED")


def given_up_before_it_was_submitted_again(run: RunFolder) -> Queue:
    given_up(run)
    run.says("attempt 3 starts on n1, n2; logs in x")
    run.attempt(3, outcome=None)
    return queue_with("FAILED")


def failed(run: RunFolder) -> Queue:
    run.submitted().locked(JOB, process=False).says("SchedulerError: squeue: Invalid user")
    return FORGOTTEN


def supervisor_killed(run: RunFolder) -> Queue:
    run.submitted().steps(1, 5).locked(JOB, process=False).attempt(1)
    return queue_with("FAILED")


def killed_by_hand(run: RunFolder) -> Queue:
    run.steps(1, 5).locked(pid=DEAD_PID)
    return UNTOLD


def nobody_knows(run: RunFolder) -> Queue:
    run.submitted().steps(1, 5).locked(JOB, process=False).attempt(1)
    return UNTOLD


def new(run: RunFolder) -> Queue:
    return UNTOLD


CASES: dict[Callable[[RunFolder], Queue], tuple[State, str]] = {
    queued: (State.queued, "job 7 is PENDING (Resources)"),
    requeued: (State.requeued, "before: at step 5 of 100, requested by SIGUSR1"),
    checked: (State.preflight, ""),
    starting: (State.starting, ""),
    training: (State.training, ""),
    training_seen_from_elsewhere: (State.training, ""),
    training_by_hand: (State.training, ""),
    resuming_by_hand: (State.starting, ""),
    saving: (State.saving, "step 20"),
    starting_after_a_save_was_cut_off: (State.starting, ""),
    stalled: (State.stalled, "no step for 8m20s"),
    slow_but_well: (State.training, ""),
    between: (State.between, "waiting for the run folder, for 300 s so far: /r: No space left"),
    finished: (State.finished, ""),
    stopped: (State.stopped, "attempt 1 stopped: at step 5 of 100, requested"),
    stopped_by_hand: (State.stopped, "at step 5 of 100; the same command goes on from there"),
    cancelled: (State.cancelled, "submit.sbatch` goes on"),
    given_up: (State.given_up, "attempts 1 and 2 both failed after step 5: no accident"),
    given_up_before_it_was_submitted_again: (State.lost, "recorded nothing about its end"),
    failed: (State.failed, "SchedulerError: squeue: Invalid user"),
    supervisor_killed: (State.lost, "recorded nothing about its end"),
    killed_by_hand: (State.lost, "ended without a word, or its machine is down"),
    nobody_knows: (State.unknown, "SLURM cannot be asked about job 7: squeue is not on PATH"),
    new: (State.new, ""),
}


def look(run: RunFolder, queue: Queue) -> RunStatus:
    """The status, which changes nothing."""
    before = sorted((str(path), path.lstat().st_mtime_ns) for path in run.folder.rglob("*"))
    found = status_of(run.folder, queue, NOW_S)
    assert sorted((str(path), path.lstat().st_mtime_ns) for path in run.folder.rglob("*")) == before
    return found


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.__name__)
def test_a_run_is_in_the_state_that_it_is_in(case: Callable[[RunFolder], Queue], tmp_path: Path) -> None:
    run = RunFolder(tmp_path / "run")
    state, why = CASES[case]
    found = look(run, case(run))
    assert (found.state, found.troubles) == (state, []) and found.why.endswith(why), found.why
    assert bool(found.why) == bool(why)


def test_what_goes_on_is_compared_with_the_plan_and_foreseen(tmp_path: Path) -> None:
    run = RunFolder(tmp_path / "run").saved(4)
    found = look(run, training(run))
    assert found.pace is not None
    assert (found.pace.step_s, found.pace.expected_step_s, found.pace.expected_by) == (2.0, 1.5, "plan")
    saved = found.checkpoints
    assert (saved.newest_step, saved.next_step) == (4, 20)
    assert saved.next_at_s == pytest.approx(NOW_S - 1 + 30)
    assert found.ends_at_s == pytest.approx(NOW_S - 1 + 190)


def test_what_starts_is_foreseen_from_its_checkpoint(tmp_path: Path) -> None:
    run = RunFolder(tmp_path / "run").saved(4)
    found = look(run, starting(run))
    assert found.state == State.starting and found.checkpoints.next_step == 20
    assert found.checkpoints.next_at_s == pytest.approx(NOW_S + 32)
    assert found.ends_at_s == pytest.approx(NOW_S + 192)
    waiting = look(run, queue_with("PENDING"))
    assert waiting.ends_at_s is None and waiting.checkpoints.next_at_s is None


def test_without_a_plan_it_is_compared_with_itself(tmp_path: Path) -> None:
    run = RunFolder(tmp_path / "run").steps(1, 40, step_s=1.0).steps(41, 60, step_s=3.0).locked()
    found = look(run, UNTOLD)
    assert found.pace is not None and found.pace.expected_by == "own median"
    assert (found.pace.step_s, found.pace.expected_step_s) == (3.0, 1.0)


def test_nodes_that_are_left_out_are_told_with_the_reason(tmp_path: Path) -> None:
    run = RunFolder(tmp_path / "run").submitted().steps(1, 5).locked(JOB, process=False)
    run.attempt(1, outcome="unfit", nodes=["n1", "n2"], unfit={"n2": "gpus: 7 GPUs"})
    run.attempt(2, outcome="failed", nodes=["n1", "n3"], first_to_fail="n3", reason="at step 5 of 100")
    run.attempt(3, outcome="failed", nodes=["n1", "n3"], first_to_fail="n3", reason="at step 5 of 100")
    run.attempt(4, nodes=["n1", "n4"], left_out={"n5": "was to blame for attempts 1 and 2 of job 6"})
    found = look(run, queue_with("RUNNING"))
    assert found.left_out == {
        "n2": "failed the preflight of attempt 1: gpus: 7 GPUs",
        "n3": "attempt 2 failed: at step 5 of 100",
        "n5": "was to blame for attempts 1 and 2 of job 6",
    }


def test_the_log_of_the_rank_to_blame_is_shown(tmp_path: Path) -> None:
    run = RunFolder(tmp_path / "run").submitted().steps(1, 5).locked(JOB, process=False)
    folder = run.attempt(1, outcome="failed", first_to_fail="n2")
    (folder / "node_n2.log").write_text("rank 1 failed first, with status -9: its message is above\n")
    (folder / "rank_0.log").write_text("gloo: connection reset\n")
    (folder / "rank_1.log").write_text("step 4\n\nDataError: shard_3\n  \x1b[31m-> copy it\x07 again\n\n")
    found = look(run, queue_with("RUNNING")).blamed_log
    assert found is not None and found.file == str(folder / "rank_1.log")
    assert found.lines == ["step 4", "DataError: shard_3", "  -> copy it  again"]
    # The next one trains: what ended the first is still shown, until an attempt ends well.
    run.attempt(2, 0.5)
    assert look(run, queue_with("RUNNING")).blamed_log == found
    record = run.folder / "attempts/2/attempt.json"
    record.write_text(json.dumps(json.loads(record.read_text()) | {"outcome": "stopped"}))
    assert look(run, queue_with("PENDING")).blamed_log is None


def test_a_verdict_counts_more_than_what_srun_saw_first(tmp_path: Path) -> None:
    run = RunFolder(tmp_path / "run").submitted().steps(1, 5)
    verdict = {"node": "n1", "rank": 0, "kind": "stuck", "reason": "rank 0 on n1 stood still"}
    folder = run.attempt(1, outcome="failed", first_to_fail="n2", blame=verdict)
    (folder / "rank_0.log").write_text("hangs\n")
    (folder / "node_n2.log").write_text("rank 1 failed first, with status 1\n")
    (folder / "rank_1.log").write_text("gloo: RuntimeError: connection reset\n")
    found = look(run, FORGOTTEN)
    assert found.blamed_log is not None and found.blamed_log.lines == ["hangs"]
    assert (found.attempts[0].blamed_node, found.attempts[0].blamed_rank) == ("n1", 0)


def test_where_nobody_was_named_the_rank_with_an_error_is_shown(tmp_path: Path) -> None:
    run = RunFolder(tmp_path / "run").submitted().steps(1, 5)
    folder = run.attempt(1, outcome="failed")
    (folder / "rank_0.log").write_text("step 5\n")
    (folder / "rank_10.log").write_text("RuntimeError: later\n")
    (folder / "rank_2.log").write_text("STALL: rank 2 hangs\n")
    found = look(run, FORGOTTEN).blamed_log
    assert found is not None and found.lines == ["STALL: rank 2 hangs"]


def broken_json(run: Path) -> None:
    (run / "submit.json").write_text("{")


def lock_of_garbage(run: Path) -> None:
    (run / "lock.json").write_bytes(b"\xff\x00")


def rows_of_garbage(run: Path) -> None:
    text = (run / "metrics.jsonl").read_bytes()
    garbage = b'{"step": true}\n[]\n{"step": "5"}\n\xff\n{"step": NaN}\n{"step": 1e999}\n'
    (run / "metrics.jsonl").write_bytes(text + garbage + b"x" * 9000 + b'\n{"step": 6, "lo')


def record_of_garbage(run: Path) -> None:
    (run / "attempts/1/attempt.json").write_text('{"number": 1, "job_id":')


def no_record(run: Path) -> None:
    (run / "attempts/1/attempt.json").unlink()


def wrong_types(run: Path) -> None:
    record = {"number": "x", "job_id": 7, "nodes": 5, "outcome": 3, "unfit": [], "reason": {}}
    (run / "attempts/1/attempt.json").write_text(json.dumps(record | {"first_to_fail": "../.."}))


def configuration_of_garbage(run: Path) -> None:
    (run / "config.yaml").write_text("a: [")


def metrics_are_a_pipe(run: Path) -> None:
    (run / "metrics.jsonl").unlink()
    os.mkfifo(run / "metrics.jsonl")


def attempts_are_a_file(run: Path) -> None:
    (run / "attempts").rename(run / "elsewhere")
    (run / "attempts").write_text("")


def link_in_a_circle(run: Path) -> None:
    (run / "supervisor.log").symlink_to("supervisor.log")


DAMAGE = (
    broken_json, lock_of_garbage, rows_of_garbage, record_of_garbage, no_record, wrong_types,
    configuration_of_garbage, metrics_are_a_pipe, attempts_are_a_file, link_in_a_circle,
)  # fmt: skip


@pytest.mark.parametrize("damage", DAMAGE, ids=lambda damage: damage.__name__)
def test_a_damaged_folder_is_shown_as_far_as_it_can_be_read(
    damage: Callable[[Path], None], tmp_path: Path
) -> None:
    run = RunFolder(tmp_path / "run")
    training(run)
    damage(run.folder)
    found = look(run, queue_with("RUNNING"))
    if damage not in (wrong_types, attempts_are_a_file):
        assert len(found.troubles) == 1 and str(run.folder) in found.troubles[0]
    if damage is rows_of_garbage:
        assert found.step == 5
    json.dumps(found.as_json(), allow_nan=False)


@pytest.mark.parametrize("outcome", [["failed"], {"failed": 1}, 7])
def test_an_outcome_that_is_no_word_is_shown(outcome: object, tmp_path: Path) -> None:
    """The job is over, so the state follows from it."""
    run = RunFolder(tmp_path / "run")
    training(run)
    record = run.folder / "attempts/1/attempt.json"
    values = {**json.loads(record.read_text()), "outcome": outcome, "first_to_fail": "n\0"}
    record.write_text(json.dumps(values))
    (run.folder / "lock.json").unlink()
    assert look(run, FORGOTTEN).state == State.failed


def test_a_large_file_of_metrics_is_read_from_its_end(tmp_path: Path) -> None:
    run = RunFolder(tmp_path / "run").locked()
    with (run.folder / "metrics.jsonl").open("wb") as file:
        file.truncate(1 << 33)
    run.steps(7, 12)
    assert look(run, UNTOLD).step == 12


@pytest.mark.skipif(os.geteuid() == 0, reason="root may read everything")
def test_a_folder_that_may_not_be_read_is_shown_as_such(tmp_path: Path) -> None:
    run = RunFolder(tmp_path / "run")
    training(run)
    run.folder.chmod(0)
    try:
        found = status_of(run.folder, UNTOLD, NOW_S)
    finally:
        run.folder.chmod(0o700)
    assert found.state == State.unknown and found.troubles


def test_the_latest_alarms_are_shown(tmp_path: Path) -> None:
    run = RunFolder(tmp_path / "run").submitted().steps(1, 5)
    rows = [
        {"step": 6, "loss": 9.0, "alarm/loss_spike": 9.0, "alarm_usual/loss_spike": 3.0},
        {"step": 7, "alarm/grad_spike/vision_tower": 5.0, "alarm_usual/grad_spike/vision_tower": 1.0},
        {"step": 8, "alarm/loss_spike": 10**400, "alarm_usual/loss_spike": 1.0, "alarm/throughput": "x"},
    ]
    with (run.folder / "metrics.jsonl").open("a") as file:
        file.writelines(f"{json.dumps(row)}\n" for row in rows)
    status = look(run, FORGOTTEN)
    assert [(each.step, each.name, each.value) for each in status.alarms] == [
        (7, "grad_spike/vision_tower", 5.0),
        (6, "loss_spike", 9.0),
    ]
    assert ("alarm", "step 6: loss spike: the loss is 9 nats, 3 is usual") in list(table.rows(status))
    assert status.as_json()["alarms"][1]["usual"] == 3.0
    assert 'k25_run_alarm_step{run="' in prometheus.as_text([status])
