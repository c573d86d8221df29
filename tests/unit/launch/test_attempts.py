"""Records of attempts, and how far a run has come."""

import dataclasses
import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from k25_train.errors import ConfigError
from launch.attempts import Attempts
from launch.history import Outcome
from launch.node import end_leftovers
from launch.old_logs import KEPT, remove_old_logs
from launch.preflight.findings import failed, passed, warned
from launch.preflight.report import write_report
from launch.progress import TAIL_BYTES, Progress
from launch.scheduler import first_to_fail, last_json
from launch.submission import Submission
from tests.helpers.written_checkpoints import write_checkpoint


def test_attempts_count_over_jobs_and_latest_leads_to_the_newest(tmp_path: Path) -> None:
    attempts = Attempts(tmp_path)
    first = attempts.start(7, ["n1", "n2"], "abc")
    second = attempts.start(8, ["n1"], "abc")
    assert [attempt.number for attempt in attempts.history()] == [1, 2]
    assert [attempt.job_id for attempt in attempts.history()] == [7, 8]
    assert os.readlink(tmp_path / "attempts/latest") == "2"
    assert attempts.folder(first) != attempts.folder(second)


@pytest.mark.parametrize(
    ("name", "changes"),
    [
        ("1.bak", {}),
        ("2", {}),
        ("2", {"number": "2"}),
        ("2", {"number": 2, "nodes": None}),
        ("2", {"number": 2, "reached": "7"}),
        ("2", {"number": 2, "unfit": ["n1"]}),
    ],
)
def test_copies_and_damaged_records_are_no_attempts(
    name: str, changes: dict[str, object], tmp_path: Path
) -> None:
    """Somebody keeps a copy of the first attempt."""
    attempts = Attempts(tmp_path)
    first = attempts.start(7, ["n1"], "abc")
    attempts.write(dataclasses.replace(first, outcome=Outcome.failed))
    copy = attempts.root / name
    copy.mkdir()
    (copy / "attempt.json").write_text(json.dumps(dataclasses.asdict(first) | changes))
    assert [attempt.outcome for attempt in attempts.history()] == ["failed"]


def test_an_attempt_without_an_end_has_vanished(tmp_path: Path) -> None:
    attempts = Attempts(tmp_path)
    ended = attempts.start(7, ["n1"], "abc")
    attempts.write(dataclasses.replace(ended, outcome=Outcome.failed, reached=3))
    attempts.start(7, ["n1"], "abc")
    attempts.close_vanished()
    assert [attempt.outcome for attempt in attempts.history()] == ["failed", "vanished"]
    assert attempts.history()[0].reached == 3


def test_a_vanished_attempt_has_got_as_far_as_the_metrics_that_it_wrote(tmp_path: Path) -> None:
    """Else one whose first node is lost now and then would be given up, however far it gets each time."""
    attempts, metrics = Attempts(tmp_path), tmp_path / "metrics.jsonl"
    metrics.write_text('{"step": 3}\n')
    os.utime(metrics, (0, 0))
    attempts.start(7, ["n1"], "abc")
    attempts.close_vanished()
    attempts.start(7, ["n1"], "abc")
    metrics.write_text('{"step": 9}\n')
    attempts.close_vanished()
    assert [attempt.reached for attempt in attempts.history()] == [None, 9]


def test_what_is_saved_is_the_newest_sound_checkpoint(tmp_path: Path) -> None:
    attempts = Attempts(tmp_path)
    assert attempts.saved_step() == 0
    write_checkpoint(tmp_path / "checkpoints", 10)
    write_checkpoint(tmp_path / "checkpoints", 20, "its loss was 30")
    (tmp_path / "checkpoints/step_30.partial").mkdir()
    assert attempts.saved_step() == 10
    attempts.start(7, ["n1"], "abc")
    attempts.close_vanished()
    assert [attempt.saved for attempt in attempts.history()] == [10]


def test_old_logs_of_attempts_that_were_stopped_go_and_nothing_else(tmp_path: Path) -> None:
    attempts = Attempts(tmp_path)
    for number in range(1, KEPT + 4):
        attempt = attempts.start(7, ["n1"], "abc")
        for name in ("rank_0.log", "rank_0.log.first", "node_n1.log"):
            (attempts.folder(attempt) / name).write_text("x")
        attempts.write(dataclasses.replace(attempt, outcome="failed" if number == 2 else "stopped"))
    remove_old_logs(attempts.root, attempts.history())
    left = {
        folder.name: {path.name for path in folder.glob("*.log*")}
        for folder in attempts.root.iterdir()
        if not folder.is_symlink()
    }
    everything = {"rank_0.log", "rank_0.log.first", "node_n1.log", "srun.log"}
    assert left.pop("1") == left.pop("3") == {"node_n1.log", "srun.log"}
    assert set(map(frozenset, left.values())) == {frozenset(everything)}
    assert len(attempts.history()) == KEPT + 3


def test_facts_of_another_version_are_reported(tmp_path: Path) -> None:
    (tmp_path / "submit.json").write_text('{"run": "x"}')
    with pytest.raises(ConfigError, match=r"submit\.json: cannot be read .*: submit the run again"):
        Submission.read(tmp_path)


def test_a_folder_without_a_record_keeps_its_number(tmp_path: Path) -> None:
    """Its supervisor found the disk full, or was killed; the run still goes on."""
    attempts = Attempts(tmp_path)
    attempts.start(7, ["n1"], "abc")
    (tmp_path / "attempts/2").mkdir()
    assert attempts.start(7, ["n1"], "abc").number == 3
    assert [attempt.number for attempt in attempts.history()] == [1, 3]


def test_why_nodes_failed_the_preflight(tmp_path: Path) -> None:
    attempts = Attempts(tmp_path)
    attempt = attempts.start(7, ["n1", "n2"], "abc")
    assert attempts.unfit(attempt) is None
    sound = [passed("disk", "9 GiB free"), warned("clock", "2 s ahead", "1 s", "chrony")]
    broken = [
        failed("gpus", "7 GPUs", "8", "drain it"),
        *sound,
        failed("clock", "1 h ahead", "1 s", "chrony"),
    ]
    write_report(attempts.folder(attempt), {"n1": sound, "n2": broken}, {})
    assert attempts.unfit(attempt) == {"n2": "gpus: 7 GPUs; clock: 1 h ahead"}


def test_a_damaged_record_is_passed_over_and_told_once(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    attempts = Attempts(tmp_path)
    for text in ("", "{", "[]", '{"number": 3}', "null"):
        attempt = attempts.start(7, ["n1"], "abc")
        (attempts.folder(attempt) / "attempt.json").write_text(text)
    attempts.start(7, ["n1"], "abc")
    for _ in range(2):
        assert [attempt.number for attempt in attempts.history()] == [6]
    assert capsys.readouterr().out.count("is damaged and passed over") == 5


def test_records_are_ordered_by_number_not_by_name(tmp_path: Path) -> None:
    attempts = Attempts(tmp_path)
    for _ in range(11):
        attempts.start(7, ["n1"], "abc")
    assert [attempt.number for attempt in attempts.history()] == list(range(1, 12))


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("", None),
        ('{"step": 0}\n', 0),
        ('{"step": 1, "loss": 2.0}\n{"step": 2, "loss": 1.0}\n', 2),
        ('{"step": 1, "loss": 2.0}\n{"step": 2, "lo', 1),
        ('{"step": 1}\n' + '{"step": 2, "x": "' + "a" * (TAIL_BYTES // 2) + '"}\n', 2),
    ],
)
def test_the_last_step_is_that_of_the_last_whole_row(tmp_path: Path, text: str, expected: int | None) -> None:
    attempts = Attempts(tmp_path)
    assert attempts.progress().last is None and attempts.metrics_stamp() is None
    (tmp_path / "metrics.jsonl").write_text(text)
    assert attempts.progress() == Progress(last=expected, sound=expected)
    assert attempts.metrics_stamp() is not None


SOUND, SKIPPED = '{"step": 2, "loss": 1.0, "grad_norm": 3.0}', '"loss": 1.0, "grad_norm": null}'


@pytest.mark.parametrize(
    ("lines", "expected"),
    [
        ([SOUND, f'{{"step": 3, {SKIPPED}', f'{{"step": 4, {SKIPPED}'], Progress(last=4, sound=2, skipped=2)),
        ([SOUND, '{"step": 3, "loss": null, "grad_norm": 1.0}'], Progress(last=3, sound=2, skipped=1)),
        ([f'{{"step": 1, {SKIPPED}'], Progress(last=1, sound=None, skipped=1)),
        ([SOUND, '{"step": 3, "lo', "\0\0", "[]"], Progress(last=2, sound=2)),
        # More rows than are read at a time.
        (
            [SOUND, *[f'{{"step": {n}, "x": "{"a" * 30_000}", {SKIPPED}' for n in range(3, 103)]],
            Progress(last=102, sound=2, skipped=100),
        ),
    ],
    ids=["skipped", "no loss", "never", "not rows", "many"],
)
def test_skipped_steps_are_no_progress(tmp_path: Path, lines: list[str], expected: Progress) -> None:
    (tmp_path / "metrics.jsonl").write_text("".join(f"{line}\n" for line in lines))
    assert Attempts(tmp_path).progress() == expected


def test_a_submission_is_read_as_it_was_written(tmp_path: Path) -> None:
    kept = Submission(
        run="/runs/x", checkout="/code", code="abc", python="python", num_steps=9, ranks_per_node=8,
        legal_nodes=[1, 2], spare_nodes=1, max_restarts=3, restart_wait_s=1.5, stop_within_s=96.0,
        preflight=True, rendezvous_port=29500, interface=None, container=["--container-image=x"],
        address_family="ipv6", cpus_per_task=16, step_options=["--mpi=none"], node_start=["bash", "-c", "x"],
        environment=[("A", "b c", "why")], comment="site", checkpoint_bytes=9, max_checkpoints=4,
        max_log_bytes=1, planned_step_s=2.5,
    )  # fmt: skip
    kept.write(tmp_path)
    found = Submission.read(tmp_path)
    assert dataclasses.replace(found, environment=[("A", "b c", "why")]) == kept
    assert found.environment == [["A", "b c", "why"]]
    # What was submitted before there were keys for sites goes on as it did.
    path = tmp_path / "submit.json"
    later = ("address_family", "cpus_per_task", "step_options", "node_start")
    earlier = {name: fact for name, fact in json.loads(path.read_text()).items() if name not in later}
    path.write_text(json.dumps(earlier))
    found = Submission.read(tmp_path)
    assert (found.address_family, found.cpus_per_task) == ("ipv4", None)
    assert found.step_options == found.node_start == [] and found.num_steps == 9


@pytest.mark.parametrize(
    ("log", "expected"),
    [
        ("", None),
        ("srun: cluster configuration lacks support for cpu binding\n", None),
        ("srun: error: n2: task 1: Exited with exit code 1\nsrun: error: n1: task 0: Killed\n", "n2"),
        ("srun: error: gpu-17: tasks 3-4,9: Killed\n", "gpu-17"),
        ("srun: error: Node failure on n3\nsrun: error: n1: task 0: Killed\n", "n3"),
        ("srun: error: Node failure on n3\n", "n3"),
    ],
)
def test_the_node_that_failed_first(log: str, expected: str | None) -> None:
    assert first_to_fail(log) == expected


def test_an_answer_is_found_behind_what_a_prolog_printed() -> None:
    assert last_json('welcome\n{"address": "n1", "port": "7"}\n') == {"address": "n1", "port": "7"}
    with pytest.raises(ValueError, match="nothing"):
        last_json("nothing\n")


def test_what_an_earlier_attempt_left_on_a_node_is_ended(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """But neither this attempt's processes, which a node on the same machine may have, nor other runs'."""
    code = "import time; time.sleep(600)"

    def started(run: str, attempt: int, what: str = "rank") -> "subprocess.Popen[bytes]":
        folder = [str(tmp_path / run / "attempts" / str(attempt))]
        arguments = folder if what != "node" else [str(tmp_path / run), str(attempt)]
        arguments = ["-m", f"launch.{what}", *arguments, "x", "x"]
        return subprocess.Popen([sys.executable, "-c", code, *arguments])

    kinds = ("rank", "node", "preflight_rank")
    left = [started("x", attempt, what) for attempt in (1, 2) for what in kinds]
    others = [started(run, attempt, what) for run, attempt in (("x", 3), ("xy", 1)) for what in kinds]
    try:
        end_leftovers(tmp_path / "x" / "attempts", "3")
        assert {process.wait(10) for process in left} == {-signal.SIGKILL}
        assert [process.poll() for process in others] == [None] * len(others)
        assert f"ending process {left[0].pid}, left by attempt 1" in capsys.readouterr().out
    finally:
        for process in (*left, *others):
            process.kill()
            process.wait()
