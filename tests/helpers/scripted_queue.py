"""A SLURM queue of scripts: what sbatch queues, squeue shows and scancel removes. For submissions."""

import os
import sys
from collections.abc import Callable
from dataclasses import fields
from pathlib import Path

import pytest

from k25_train.run_folder import lock
from launch import queueing
from launch.submission import CONFIG, FACTS, SCRIPT, Submission

TOOLS = {
    "squeue": """
case "$*" in *--jobs=*)
    job=$(echo "$*" | sed 's/.*--jobs=\\([0-9]*\\).*/\\1/')
    grep -q "^$job|" "$QUEUE" && echo "$job|PENDING" || { echo "Invalid job id specified" >&2; exit 1; }
    exit;; esac
cat "$QUEUE" """,
    "scancel": 'sed -i "/^$1|/d" "$QUEUE"; echo "$1" >> "$QUEUE.cancelled"',
    "sbatch": """
case "$*" in --test-only*) echo "sbatch: Job 7 to start at noon" >&2; exit;; esac
[ -f "$QUEUE.before" ] && . "$QUEUE.before"
job=$(($(cat "$QUEUE.next") + 1)); echo $job > "$QUEUE.next"
echo "$job|$2 $3" >> "$QUEUE"
[ -f "$QUEUE.after" ] && . "$QUEUE.after"
echo $job""",
}


class ScriptedQueue:
    """A login node with a queue."""

    def __init__(self, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        """An empty queue; the first job will be number 8."""
        self.folder = folder
        self.queue = folder / "queue"
        self.queue.touch()
        (folder / "queue.next").write_text("7\n")
        (folder / "bin").mkdir()
        for name, script in TOOLS.items():
            path = folder / "bin" / name
            path.write_text(f"#!/bin/sh\n{script}\n")
            path.chmod(0o755)
        monkeypatch.setenv("PATH", f"{folder}/bin:{os.environ['PATH']}")
        monkeypatch.setenv("QUEUE", str(self.queue))

    def before_queueing(self, script: str) -> None:
        """What sbatch does before the job is in the queue, as a shell script."""
        (self.folder / "queue.before").write_text(script)

    def after_queueing(self, script: str) -> None:
        """What sbatch does once the job is in the queue."""
        (self.folder / "queue.after").write_text(script)

    def jobs(self) -> list[int]:
        """Numbers of the jobs in the queue."""
        return [int(line.split("|")[0]) for line in self.queue.read_text().splitlines()]

    def cancelled(self) -> list[int]:
        """Numbers of the jobs that were cancelled."""
        path = self.folder / "queue.cancelled"
        return [int(line) for line in path.read_text().split()] if path.exists() else []

    def submit(self, run: Path, mark: str) -> int:
        """Submit a run whose files all contain a mark; its job's number."""
        return queueing.queue(a_submission(run), f"config {mark}\n", f"script {mark}\n")[0]


EMPTY: dict[object, object] = {str: "", int: 0, float: 0.0, bool: False}


def a_submission(run: Path) -> Submission:
    """A submission before it is queued; what is not about queueing is empty."""
    values: dict[str, object] = {}
    for field in fields(Submission):
        values[field.name] = [] if str(field.type).startswith("list") else EMPTY.get(field.type)
    values |= {"run": str(run), "legal_nodes": [1], "token": ""}
    return Submission(**values)  # type: ignore[arg-type]


def mark_of(run: Path) -> str:
    """The mark of the submission in a run folder, which has to be of one piece; empty without one."""
    if not (run / FACTS).exists():
        assert not (run / CONFIG).exists() and not (run / SCRIPT).exists()
        return ""
    config, script = ((run / name).read_text().split()[1] for name in (CONFIG, SCRIPT))
    assert config == script
    return config


def job_of(run: Path) -> int | None:
    """The job that has the folder."""
    holder = lock.current(run)
    return None if holder is None else holder.job_id


def files_of(run: Path) -> list[str]:
    """Names of what is in a run folder."""
    return sorted(path.name for path in run.iterdir())


def in_child(body: Callable[[], object]) -> int:
    """Do something in a forked process; its exit status, negative for a signal."""
    pid = os.fork()
    if pid == 0:
        try:
            body()
        except KeyboardInterrupt:
            os._exit(130)
        except BaseException as error:
            print(error, file=sys.stderr)
            os._exit(2)
        os._exit(0)
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
