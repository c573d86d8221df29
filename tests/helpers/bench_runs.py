"""Runs that a bench needs: kept in one folder, gone on with where they were, some at once."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

from k25_train.metrics.sinks import Row, read_rows


@dataclass(frozen=True, slots=True, kw_only=True)
class Job:
    """A run of its own."""

    name: str
    """Its folder."""
    command: tuple[str, ...]
    """Of Python: the module."""
    settings: tuple[str, ...]
    """Of the run."""
    steps: int
    """That it has when it is finished."""


class BenchRuns:
    """Runs below one folder."""

    def __init__(self, folder: Path, jobs: int) -> None:
        self.folder = folder
        self.jobs = jobs

    def rows(self, name: str) -> list[Row]:
        """What a run said so far."""
        path = self.folder / name / "metrics.jsonl"
        return read_rows(path) if path.is_file() else []

    def checkpoint(self, name: str, steps: int) -> Path:
        """The last checkpoint of a run."""
        return self.folder / name / "checkpoints" / f"step_{steps}"

    def evaluations(self, name: str) -> tuple[Row, Row]:
        """Of held-out tasks, the first and the last."""
        rows = [row for row in self.rows(name) if "eval_accuracy" in row]
        return rows[0], rows[-1]

    def run(self, jobs: Sequence[Job]) -> None:
        """Run what is not finished, some at once; exits if one fails."""
        with ThreadPoolExecutor(self.jobs) as pool:
            list(pool.map(self._run, jobs))

    def python(self, *arguments: str) -> None:
        """Run a command of the project to its end; exits if it fails."""
        done = subprocess.run(
            [sys.executable, *arguments], env=environment(), capture_output=True, text=True, check=False
        )
        if done.returncode:
            sys.exit(f"{' '.join(arguments)} failed:\n{done.stdout}{done.stderr}")

    def _run(self, job: Job) -> None:
        has_rows = any(row["step"] == job.steps for row in self.rows(job.name))
        if has_rows and self.checkpoint(job.name, job.steps).is_dir():
            return
        print(f"{job.name}: {job.steps} steps", flush=True)
        self.python(
            *job.command, *job.settings, f"train.steps={job.steps}", f"run.dir={self.folder / job.name}"
        )


def environment() -> dict[str, str]:
    """Of a run: one thread, since a tiny model gains nothing by more."""
    return {**os.environ, "OMP_NUM_THREADS": "1"}
