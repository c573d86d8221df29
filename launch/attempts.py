"""The attempts of a run on disk: their folders, records and logs, and how far the run has come."""

import dataclasses
import functools
import json
import os
import shutil
from collections.abc import Sequence
from pathlib import Path

from launch import scheduler
from launch.blame.verdict import Verdict
from launch.history import Attempt, Outcome
from launch.old_logs import remove_old_logs
from launch.patience import Patience, UnwritableError
from launch.progress import Progress, progress_of, stamp_of
from launch.submission import write_atomically

RECORD, LATEST, PREFLIGHT = "attempt.json", "latest", "preflight.json"
METRICS = "metrics.jsonl"


class Attempts:
    """The folder `attempts/` of a run."""

    def __init__(self, run: Path, patience: Patience | None = None) -> None:
        """`run` is the run folder; `patience` is for files that cannot be read or written for the moment,
        none by default."""
        self.run = run
        self.root = run / "attempts"
        self.patience = patience or Patience(run)
        self._unwritten: dict[int, Attempt] = {}
        """Number -> record that the folder did not take yet."""
        self._damaged: set[Path] = set()

    def folder(self, attempt: Attempt) -> Path:
        """The folder of an attempt's record and logs."""
        return self.root / str(attempt.number)

    def srun_log(self, attempt: Attempt) -> Path:
        """Output of the srun that runs an attempt's ranks."""
        return self.folder(attempt) / "srun.log"

    def preflight_log(self, attempt: Attempt) -> Path:
        """Output of the srun that runs an attempt's preflight."""
        return self.folder(attempt) / "preflight_srun.log"

    def unfit(self, attempt: Attempt) -> dict[str, str] | None:
        """Node -> why it failed the preflight of an attempt; None if there is no report."""
        try:
            report = json.loads((self.folder(attempt) / PREFLIGHT).read_text(encoding="utf-8"))
        except FileNotFoundError:
            return None
        found: dict[str, str] = {}
        for node, own in report["nodes"].items():
            failures = [finding for finding in own["findings"] if finding["verdict"] == "failed"]
            if failures:
                found[node] = "; ".join(f"{finding['check']}: {finding['found']}" for finding in failures)
        return found

    def has_report(self, attempt: Attempt) -> bool:
        """Whether the preflight of an attempt has written its report."""
        try:
            return (self.folder(attempt) / PREFLIGHT).exists()
        except OSError:
            return False

    def history(self) -> list[Attempt]:
        """All attempts so far, oldest first. Raises `UnwritableError` if they cannot be read."""
        found = {attempt.number: attempt for attempt in self.patience.of(self._read)} | self._unwritten
        return [found[number] for number in sorted(found)]

    def _read(self) -> list[Attempt]:
        found = []
        for path in self.root.glob(f"*/{RECORD}"):
            # Nor a copy that somebody keeps there.
            if path.parent.is_symlink() or not path.parent.name.isdecimal():
                continue
            try:
                found.append(parse_record(path.read_text(encoding="utf-8"), int(path.parent.name)))
            except (ValueError, TypeError, AttributeError) as error:
                self._pass_over(path, error)
        return found

    def _pass_over(self, path: Path, error: Exception) -> None:
        """Tell once that a record is damaged: the run goes on without it."""
        if path not in self._damaged:
            self._damaged.add(path)
            self.patience.tell(f"{path}: is damaged and passed over ({error})")

    def start(self, job_id: int, nodes: Sequence[str], code: str) -> Attempt:
        """Create a new attempt with its folder, and point `latest` to it.

        Raises `UnwritableError` if the run folder does not take it.
        """
        return self.patience.of(lambda: self._start(job_id, nodes, code))

    def _start(self, job_id: int, nodes: Sequence[str], code: str) -> Attempt:
        # A file system that is not mounted at the moment must not get a run folder below its mount point.
        os.stat(self.run)
        # Folders count, not records: on a full disk, a folder may exist without its record.
        number = max((int(path.name) for path in self.root.glob("*") if path.name.isdigit()), default=0) + 1
        attempt = Attempt(number=number, job_id=job_id, nodes=list(nodes), code=code)
        self.folder(attempt).mkdir(parents=True)
        try:
            self._write(attempt)
            self.srun_log(attempt).touch()
            scratch = self.root / f"{LATEST}.{job_id}"
            scratch.unlink(missing_ok=True)
            scratch.symlink_to(str(number))
            os.replace(scratch, self.root / LATEST)
        except OSError:
            # Otherwise each try would leave an attempt.
            shutil.rmtree(self.folder(attempt), ignore_errors=True)
            raise
        return attempt

    def write(self, attempt: Attempt) -> None:
        """Write an attempt's record, and what could not be written before.

        It is kept in memory if the run folder does not take it: a job that has to stop cannot wait.
        """
        self._unwritten[attempt.number] = attempt
        try:
            for number, each in list(self._unwritten.items()):
                self.patience.of(functools.partial(self._write, each))
                del self._unwritten[number]
        except UnwritableError as error:
            self.patience.tell(f"the record of attempt {attempt.number} could not be written: {error}")

    def _write(self, attempt: Attempt) -> None:
        os.stat(self.run)
        self.folder(attempt).mkdir(parents=True, exist_ok=True)
        record = json.dumps(dataclasses.asdict(attempt), indent=1)
        write_atomically(self.folder(attempt) / RECORD, record + "\n")

    def close_vanished(self) -> list[Attempt]:
        """Record attempts without an outcome as vanished, and return them; to be called while none is
        running.

        An attempt has trained if the metrics are newer than its record, which was written at its start.
        """
        stamp, vanished = self.metrics_stamp(), []
        for attempt in self.history():
            if attempt.outcome is None:
                record = self.folder(attempt) / RECORD
                started_ns = self.patience.of(record.stat).st_mtime_ns
                has_trained = stamp is not None and stamp[0] >= started_ns
                progress = self.progress() if has_trained else Progress()
                ended = dataclasses.replace(
                    attempt,
                    outcome=Outcome.vanished,
                    reached=progress.sound,
                    saved=self.saved_step(),
                    skipped=progress.skipped,
                    reason="its supervisor ended before it could record the outcome: it was killed, or lost "
                    "with its node",
                )
                self.write(ended)
                vanished.append(ended)
        remove_old_logs(self.root, self.history())
        return vanished

    def first_to_fail(self, attempt: Attempt) -> str | None:
        """The node on which a process of the attempt failed first."""
        logs = (self.srun_log(attempt), self.preflight_log(attempt))
        named = (scheduler.first_to_fail(read_log(log)) for log in logs if log.exists())
        return next((node for node in named if node is not None), None)

    def metrics_stamp(self) -> tuple[int, int] | None:
        """Modification time and size of the metrics file; None if it does not exist."""
        return self.patience.of(lambda: stamp_of(self.run / METRICS))

    def saved_step(self) -> int | None:
        """Step of the newest sound checkpoint, 0 if there is none; None if that cannot be seen.

        By their names: others end in `.partial` or `.unsound`.
        """
        try:
            names = [path.name for path in (self.run / "checkpoints").iterdir()]
        except FileNotFoundError:
            return 0
        except OSError:
            return None
        steps = [name.removeprefix("step_") for name in names if name.startswith("step_")]
        return max((int(step) for step in steps if step.isdecimal()), default=0)

    def done(self, num_steps: int) -> str | None:
        """In words, that the run has all its steps; None if it has not, or that cannot be seen."""
        saved = self.saved_step()
        if saved is None or saved < num_steps:
            return None
        return (
            f"step {saved} of {num_steps} is done; nothing to do: raise train.steps to go on, or choose "
            "another run.dir to start again"
        )

    def progress(self) -> Progress:
        """How far the run has come. Skipped steps are no progress, however many there are."""
        return self.patience.of(lambda: progress_of(self.run / METRICS))


def parse_record(text: str, number: int) -> Attempt:
    """The record of the attempt with this number; one of an earlier version has no verdict.

    Raises ValueError, TypeError or AttributeError if it is damaged.
    """
    values = json.loads(text)
    blame = values.pop("blame", None)
    found = Attempt(**values, blame=None if blame is None else Verdict(**blame))
    if found.number != number:
        raise ValueError(f"it is that of attempt {found.number}")
    counts = (found.job_id, found.skipped, found.reached or 0, found.saved or 0)
    tables = (found.unfit, found.left_out)
    if not (
        all(isinstance(count, int) for count in counts)
        and all(isinstance(table, dict) for table in tables)
        and isinstance(found.nodes, list)
    ):
        raise TypeError("a value is of another kind than it should be")
    return found


def read_log(log: Path) -> str:
    """What srun and the tools of a node have written, in any encoding; empty if it cannot be read.

    A file system that is unavailable for a moment must not end ranks that are fine.
    """
    try:
        return log.read_text(encoding="utf-8", errors="replace")
    except OSError:
        return ""
