"""The attempts of a run on disk: their folders, records and logs, and how far the run has come."""

import dataclasses
import json
import os
from collections.abc import Sequence
from pathlib import Path

from launch.restart_policy import Attempt, Outcome
from launch.submission import write_whole

RECORD, LATEST, PREFLIGHT = "attempt.json", "latest", "preflight.json"
TAIL_BYTES = 1 << 20
"""More than two rows of the metrics."""


class Attempts:
    """`attempts/` of a run folder."""

    def __init__(self, run: Path) -> None:
        """Of this run folder."""
        self.run = run
        self.root = run / "attempts"

    def folder(self, attempt: Attempt) -> Path:
        """Where an attempt's record and logs stand."""
        return self.root / str(attempt.number)

    def srun_log(self, attempt: Attempt) -> Path:
        """What srun itself says of an attempt."""
        return self.folder(attempt) / "srun.log"

    def preflight_log(self, attempt: Attempt) -> Path:
        """What srun says of an attempt's preflight."""
        return self.folder(attempt) / "preflight_srun.log"

    def unfit(self, attempt: Attempt) -> dict[str, str] | None:
        """Node -> why it failed the preflight of an attempt; None if that left no report."""
        try:
            report = json.loads((self.folder(attempt) / PREFLIGHT).read_text())
        except FileNotFoundError:
            return None
        found: dict[str, str] = {}
        for node, own in report["nodes"].items():
            failures = [finding for finding in own["findings"] if finding["verdict"] == "failed"]
            if failures:
                found[node] = "; ".join(f"{finding['check']}: {finding['found']}" for finding in failures)
        return found

    def has_report(self, attempt: Attempt) -> bool:
        """Whether the preflight of an attempt has found out what it can."""
        return (self.folder(attempt) / PREFLIGHT).exists()

    def history(self) -> list[Attempt]:
        """All attempts so far, oldest first."""
        records = self.root.glob(f"*/{RECORD}")
        found = [Attempt(**json.loads(path.read_text())) for path in records if not path.parent.is_symlink()]
        return sorted(found, key=lambda attempt: attempt.number)

    def start(self, job_id: int, nodes: Sequence[str], code: str) -> Attempt:
        """A new attempt with a folder of its own, which `latest` leads to."""
        # By folder: one whose record was not written, on a full disk, is there nevertheless.
        number = max((int(path.name) for path in self.root.glob("*") if path.name.isdigit()), default=0) + 1
        attempt = Attempt(number=number, job_id=job_id, nodes=list(nodes), code=code)
        self.folder(attempt).mkdir(parents=True)
        self.write(attempt)
        self.srun_log(attempt).touch()
        scratch = self.root / f"{LATEST}.{job_id}"
        scratch.unlink(missing_ok=True)
        scratch.symlink_to(str(number))
        os.replace(scratch, self.root / LATEST)
        return attempt

    def write(self, attempt: Attempt) -> None:
        """Keep what is known of an attempt."""
        record = json.dumps(dataclasses.asdict(attempt), indent=1)
        write_whole(self.folder(attempt) / RECORD, record + "\n")

    def close_vanished(self) -> None:
        """Give attempts an outcome whose supervisor was gone before it could; only while none runs.

        Where the metrics are younger than the record of its start, an attempt trained.
        """
        stamp = self.metrics_stamp()
        for attempt in self.history():
            if attempt.outcome is None:
                started_ns = (self.folder(attempt) / RECORD).stat().st_mtime_ns
                reached = self.last_step() if stamp is not None and stamp[0] >= started_ns else None
                reason = "its supervisor was gone before it could tell"
                self.write(
                    dataclasses.replace(attempt, outcome=Outcome.vanished, reached=reached, reason=reason)
                )

    def metrics_stamp(self) -> tuple[int, int] | None:
        """Changes whenever ranks write metrics."""
        try:
            status = (self.run / "metrics.jsonl").stat()
        except FileNotFoundError:
            return None
        return status.st_mtime_ns, status.st_size

    def last_step(self) -> int | None:
        """Step of the last whole row of the metrics; None if there is none."""
        try:
            with (self.run / "metrics.jsonl").open("rb") as file:
                file.seek(max(0, file.seek(0, os.SEEK_END) - TAIL_BYTES))
                lines = file.read().split(b"\n")[:-1]
        except FileNotFoundError:
            return None
        return int(json.loads(lines[-1])["step"]) if lines else None
