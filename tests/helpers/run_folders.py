"""Run folders as runs leave them, written by hand, for tests of what is read from them."""

import json
import os
import time
from pathlib import Path
from typing import Any

from k25_train.run_folder.process import this_process
from k25_train.run_folder.record import LOCK, SINCE_FORMAT, new_holder
from launch.status.queue import Queue, QueuedJob
from tests.helpers.written_checkpoints import write_checkpoint

NOW_S = time.time()
JOB = 7


class RunFolder:
    """A run folder that a test fills."""

    def __init__(self, folder: Path, steps: int = 100, interval: int = 20) -> None:
        """Of a run whose configuration is known."""
        self.folder = folder
        folder.mkdir(parents=True, exist_ok=True)
        config = f"model:\n  name: tiny\ntrain:\n  steps: {steps}\ncheckpoint:\n  interval: {interval}\n"
        (folder / "config.yaml").write_text(config)

    def submitted(self, **values: Any) -> "RunFolder":
        """Submitted to SLURM."""
        facts = {"num_steps": 100, "preflight": True, "planned_step_s": 1.5} | values
        (self.folder / "submit.json").write_text(json.dumps(facts))
        return self

    def steps(self, first: int, last: int, ago_s: float = 1.0, step_s: float = 2.0) -> "RunFolder":
        """Metrics of some steps, the last one so long ago."""
        path = self.folder / "metrics.jsonl"
        with path.open("a") as file:
            for step in range(first, last + 1):
                row = {"step": step, "loss": 9.0 - step / 100, "grad_norm": 0.5, "lr": 1e-3}
                file.write(json.dumps(row | {"step_time_s": step_s, "tokens_per_s": 1000.0}) + "\n")
        os.utime(path, (NOW_S - ago_s, NOW_S - ago_s))
        return self

    def saved(self, *steps: int, ago_s: float = 10.0) -> "RunFolder":
        """Complete checkpoints."""
        for step in steps:
            manifest = write_checkpoint(self.folder / "checkpoints", step) / "manifest.json"
            os.utime(manifest, (NOW_S - ago_s, NOW_S - ago_s))
        return self

    def attempt(self, number: int, ago_s: float = 60.0, **values: Any) -> Path:
        """An attempt; returns its folder."""
        folder = self.folder / f"attempts/{number}"
        folder.mkdir(parents=True)
        record = {"number": number, "job_id": JOB, "nodes": ["n1", "n2"], "code": "abc", "outcome": None}
        path = folder / "attempt.json"
        path.write_text(json.dumps(record | values))
        os.utime(path, (NOW_S - ago_s, NOW_S - ago_s))
        return folder

    def says(self, *lines: str) -> "RunFolder":
        """The supervisor's log."""
        with (self.folder / "supervisor.log").open("a") as file:
            file.writelines(f"[2026-01-02 03:04:05] {line}\n" for line in lines)
        return self

    def locked(
        self, job_id: int | None = None, *, process: bool = True, pid: int | None = None
    ) -> "RunFolder":
        """Held by this process, or one with another number, or by a job alone."""
        holder = new_holder(job_id, this_process() if process else None)
        values = json.loads(holder.to_json())
        values["since"] = time.strftime(SINCE_FORMAT, time.localtime(NOW_S - 50))
        if pid is not None:
            values["process"] |= {"pid": pid, "started_ticks": 1}
        (self.folder / LOCK).write_text(json.dumps(values))
        return self


def queue_with(state: str, reason: str = "", comment: str = "") -> Queue:
    """SLURM's queue with the run's job."""
    job = QueuedJob(
        id=JOB,
        state=state,
        num_nodes=2,
        nodelist="" if state == "PENDING" else "n[1-2]",
        reason=reason,
        comment=comment,
        script="",
    )
    return Queue(jobs={JOB: job})
