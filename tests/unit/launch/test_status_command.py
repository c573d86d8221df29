"""What k25-status prints: tables, JSON, a file for Prometheus, and exit statuses."""

import io
import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace

import pytest
from prometheus_client.parser import text_string_to_metric_families
from rich.console import Console

from launch.status import __main__ as command
from launch.status import facts, prometheus
from launch.status.judging import State
from launch.status.queue import parse
from launch.status.report import RunStatus, status_of
from launch.status.table import print_run
from tests.helpers.in_process import status_of_command
from tests.helpers.project_sources import REPO
from tests.helpers.run_folders import JOB, NOW_S, RunFolder, queue_with

SQUEUE = """#!/bin/sh
echo "$*" >> "$0.calls"
printf '{jobs}'
"""


@pytest.fixture
def full(tmp_path: Path) -> RunFolder:
    """A run with everything that can be shown."""
    run = RunFolder(tmp_path / "runs/a run").submitted().saved(20, 40)
    run.steps(1, 45).locked(JOB, process=False)
    unfit = "preflight failed on n2 (gpus: 7 GPUs)"
    run.attempt(1, outcome="unfit", unfit={"n2": "gpus: 7 GPUs"}, reason=unfit)
    killed = "at step 33 of 100, srun ended with status 137, first on n3, see node_n3.log"
    nodes = ["n1", "n3"]
    folder = run.attempt(2, outcome="failed", nodes=nodes, first_to_fail="n3", reached=33, reason=killed)
    (folder / "node_n3.log").write_text("[red]not markup[/red] \x1b[2J → ü " + "x" * 500 + "\n")
    run.attempt(3, nodes=["n1", "n4", "n5", "n6"])
    return run


@pytest.fixture
def squeue(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A squeue that knows the jobs in a file next to it."""
    script = tmp_path / "bin/squeue"
    script.parent.mkdir()
    script.write_text(SQUEUE.format(jobs=""))
    script.chmod(0o755)
    monkeypatch.setenv("PATH", f"{script.parent}:/usr/bin:/bin")
    monkeypatch.chdir(tmp_path)
    # Folders are as old as their files say, however long other tests have taken before.
    monkeypatch.setattr(facts, "time", SimpleNamespace(time=lambda: NOW_S))
    yield script


def status(run: RunFolder) -> RunStatus:
    """The status of a run whose job runs."""
    return status_of(run.folder, queue_with("RUNNING", comment="k25: attempt 3 trains"), NOW_S)


def run_command(*arguments: str | Path) -> int:
    """Run the command in this process; its exit status."""
    return status_of_command(command.main, *arguments)


@pytest.mark.parametrize("width", [60, 80, 160])
def test_a_table_says_it_all_within_the_width(full: RunFolder, width: int) -> None:
    output = io.StringIO()
    print_run(Console(file=output, width=width, highlight=False), status(full))
    table, _, log = output.getvalue().partition("end of ")
    lines = table.splitlines()[1:]
    assert max(map(len, lines)) <= width
    text = " ".join("".join(sign if sign not in "│┃" else " " for sign in table).split())
    for words in (
        "a run: training", "45 of 100, 1s ago", "75% of the plan's pace (1.5 s)", "next at step 60 in 29s",
        "7 RUNNING on n[1-2] (k25: attempt 3 trains)", "loss 8.5500, grad norm 0.500", "step 40, 10s ago",
    ):  # fmt: skip
        assert words in text, words
    assert "[red]not markup[/red]" in log and "\x1b" not in log and log.count("\n") == 2


def test_json_has_the_documented_fields(full: RunFolder, capsys: pytest.CaptureFixture[str]) -> None:
    assert run_command("--json", full.folder) == 0
    (found,) = json.loads(capsys.readouterr().out)["runs"]
    assert sorted(found) == sorted(
        (
            "format_version", "run", "at_s", "state", "why", "model", "job", "step", "steps", "loss",
            "grad_norm",
            "learning_rate", "last_step_at_s", "pace", "checkpoints", "ends_at_s", "attempts", "left_out",
            "blamed_log", "troubles", "alarms",
        )
    )  # fmt: skip
    assert found["format_version"] == 1 and found["step"] == 45 and found["left_out"]["n2"]
    assert [attempt["outcome"] for attempt in found["attempts"]] == ["unfit", "failed", None]
    assert found["blamed_log"]["file"].endswith("attempts/2/node_n3.log")


def test_prometheus_reads_what_is_written(full: RunFolder, tmp_path: Path) -> None:
    odd = RunFolder(tmp_path / 'odd"a\\name\nü')
    path = tmp_path / "k25.prom"
    path.write_text("of before")
    text = prometheus.as_text([status(full), status_of(odd.folder, queue_with("RUNNING"), NOW_S)])
    prometheus.write(path, text)
    families = {family.name: family for family in text_string_to_metric_families(path.read_text())}
    assert set(families) <= set(prometheus.GAUGES)
    for family in families.values():
        assert family.type == "gauge" and family.documentation == prometheus.GAUGES[family.name]
    runs = {sample.labels["run"] for sample in families["k25_run_state"].samples}
    assert runs == {str(full.folder), str(odd.folder)}
    states = [
        sample.labels["state"] for sample in families["k25_run_state"].samples
        if sample.value == 1 and sample.labels["run"] == str(full.folder)
    ]  # fmt: skip
    assert states == ["training"]
    assert families["k25_run_left_out_node"].samples[0].labels["node"] == "n2"
    (step,) = families["k25_run_step"].samples
    assert step.value == 45 and step.timestamp is None
    # Of the file, nothing but itself; the collector is another user.
    assert path.stat().st_mode & 0o777 == 0o644 and not list(tmp_path.glob(".k25.prom*"))


def test_a_file_that_cannot_be_written_is_named(
    full: RunFolder, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run_command(full.folder, "--prometheus", tmp_path / "nowhere/k25.prom") == 2
    assert "MachineError" in capsys.readouterr().err
    os.mkfifo(tmp_path / "pipe")
    assert run_command(full.folder, "--prometheus", tmp_path / "pipe") == 2
    assert "pipe: is no file; - prints" in capsys.readouterr().err


def test_all_runs_of_a_folder_and_of_the_users_jobs_are_listed(
    squeue: Path, full: RunFolder, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "runs/no run").mkdir()
    RunFolder(tmp_path / "runs/other").steps(1, 100).saved(100)
    elsewhere = RunFolder(tmp_path / "elsewhere/third").submitted().locked(JOB, process=False)
    line = f"{JOB}|PENDING|2||Priority|(null)|{elsewhere.folder}/submit.sbatch\\n"
    squeue.write_text(SQUEUE.format(jobs=f"{line}8_[1-3]|PENDING|1||None||x\\n"))
    assert run_command("--json") == 0
    found = json.loads(capsys.readouterr().out)["runs"]
    states = {Path(run["run"]).name: run["state"] for run in found}
    assert states == {"a run": "requeued", "other": "finished", "third": "queued"}
    assert len((squeue.parent / "squeue.calls").read_text().splitlines()) == 1
    assert run_command() == 0
    printed = capsys.readouterr().out
    assert "45 of 100" in printed and "third" in printed and max(map(len, printed.splitlines())) <= 80


@pytest.mark.parametrize(
    ("state", "expected"),
    [("RUNNING", 10), ("PENDING", 10), ("CANCELLED", 20), ("FAILED", 30), ("finished", 0)],
)
def test_scripts_can_ask(squeue: Path, full: RunFolder, state: str, expected: int) -> None:
    if state == "finished":
        full.saved(100)
        state = "COMPLETED"
    squeue.write_text(SQUEUE.format(jobs=f"{JOB}|{state}|2|n[1-2]|None|a=b|c|/x\\n"))
    assert run_command(full.folder, "--check") == expected
    assert run_command(full.folder) == 0


def test_what_is_no_run_is_refused(squeue: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run_command(tmp_path / "nothing") == 2
    assert "nothing: is not the folder of a run" in capsys.readouterr().err
    assert run_command() == 2
    assert "no run was found there" in capsys.readouterr().err
    assert run_command("--watch", "0") == 2


def test_watching_ends_with_the_run(
    squeue: Path, full: RunFolder, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    squeue.write_text(SQUEUE.format(jobs=f"{JOB}|RUNNING|2|n[1-2]|None||/x\\n"))
    pauses = []

    def pause(seconds: float) -> None:
        pauses.append(seconds)
        if len(pauses) == 2:
            full.saved(100)
            squeue.write_text(SQUEUE.format(jobs=""))

    monkeypatch.setattr(command, "time", SimpleNamespace(sleep=pause))
    assert run_command(full.folder, "--watch", "5", "--json", "--check") == 0
    lines = capsys.readouterr().out.splitlines()
    assert [json.loads(line)["runs"][0]["state"] for line in lines] == ["training", "training", "finished"]
    assert pauses == [5.0, 5.0]


def test_a_login_node_needs_no_torch_and_no_utf8(full: RunFolder) -> None:
    check = "assert not {'torch', 'hydra'} & set(sys.modules)"
    code = f"import sys, launch.status.__main__ as m; m.main(); {check}"
    done = subprocess.run(
        [sys.executable, "-c", code, str(full.folder)],
        cwd=REPO,
        env=os.environ | {"PYTHONIOENCODING": "ascii", "PATH": "/nowhere", "NO_COLOR": "1"},
        capture_output=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr.decode()
    printed = done.stdout.decode("ascii")
    assert "45 of 100" in printed and "| attempt |" in printed


def test_squeues_lines() -> None:
    job = parse("7|PENDING|4||Resources|a|b | k25: queued|/r/submit.sbatch\n")
    assert job is not None and (job.id, job.reason, job.comment) == (7, "Resources", "a|b | k25: queued")
    assert parse("7_[1-3]|PENDING|4||None|(null)|x") is None and parse("slurm_load_jobs error") is None


def test_every_state_has_its_exit_status() -> None:
    assert {command.serious(state) for state in State} == {0, 10, 20, 30}
