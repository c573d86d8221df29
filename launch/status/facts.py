"""A run folder as it is found: what every file says, without conclusions."""

import os
import re
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from k25_train.run_folder.process import Liveness, liveness
from k25_train.run_folder.record import LOCK, Holder, LockedError, parse
from launch.attempts import RECORD
from launch.status.files import MAX_BYTES, Reader, modified_s, number
from launch.submission import CONFIG, FACTS, SUPERVISOR_LOG

METRICS_BYTES = 1 << 20
"""What is read of the metrics' end: some hundred rows."""
LOG_BYTES = 64 << 10
BEAT_LIMIT_S = 60.0
"""Age of a lock's time stamp beyond which its holder is not counted as alive. It is renewed every 2 s, but
clocks differ and Python may be busy."""
MARKS = (LOCK, FACTS, "config.yaml", "metrics.jsonl", "attempts", "checkpoints")
"""What a run folder has, some of it at least."""
_STEP = re.compile(r"step_(\d+)(\.partial)?")


@dataclass(frozen=True, slots=True, kw_only=True)
class Saved:
    """A checkpoint, or one that is being written."""

    step: int
    at_s: float
    """When it was completed, or when a file was last added, in seconds since 1970."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Record:
    """An attempt as recorded, with when its record was last written."""

    number: int
    folder: Path
    values: dict[str, Any]
    """As in `attempt.json`; empty if that is missing or damaged."""
    changed_s: float
    """When it was written: at the attempt's start, and at its end."""
    has_ranks: bool
    """Whether a rank has started; all but the newest attempt are taken to have ranks."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Facts:
    """What a run folder says."""

    run: Path
    now_s: float
    submission: dict[str, Any]
    """`submit.json`; empty for a run started by hand."""
    settings: dict[str, Any]
    """The configuration; empty if there is none."""
    holder: Holder | None
    """Who has the lock, or had it last."""
    is_alive: bool | None
    """Whether the process that has the lock lives; None if that cannot be told, or no process has it."""
    records: list[Record]
    """Attempts, oldest first."""
    rows: list[dict[str, Any]]
    """The latest metrics, newest first."""
    metrics_s: float | None
    """When a row was last added."""
    checkpoint: Saved | None
    partial: Saved | None
    supervisor: list[str]
    """The last lines of the supervisor's log."""
    troubles: list[str]
    """What could not be read."""

    def setting(self, *keys: str) -> Any:
        """A value of the configuration; None if there is none."""
        found: Any = self.settings
        for key in keys:
            found = found.get(key) if isinstance(found, dict) else None
        return found

    @property
    def steps(self) -> int | None:
        """`train.steps`."""
        found = number(self.submission.get("num_steps")) or number(self.setting("train", "steps"))
        return None if found is None else int(found)

    @property
    def job_id(self) -> int | None:
        """The SLURM job that the run belongs to, or belonged to last."""
        if self.holder is not None:
            return self.holder.job_id
        found = number(self.records[-1].values.get("job_id")) if self.records else None
        return None if found is None else int(found)


def is_run(folder: Path) -> bool:
    """Whether a folder looks like that of a run, as far as it can be seen."""
    return any(os.path.lexists(folder / name) for name in MARKS)


def look(run: Path, now_s: float | None = None) -> Facts:
    """Read a run folder; never raises on what is in it."""
    reader = Reader()
    checkpoint, partial = _checkpoints(reader, run / "checkpoints")
    holder, is_alive = _holder(reader, run, time.time() if now_s is None else now_s)
    lines = reader.end_of(run / SUPERVISOR_LOG, LOG_BYTES).decode(errors="replace").splitlines()
    return Facts(
        run=run,
        now_s=time.time() if now_s is None else now_s,
        submission=reader.object_in(run / FACTS),
        settings=_settings(reader, run),
        holder=holder,
        is_alive=is_alive,
        records=_records(reader, run / "attempts"),
        rows=list(reader.rows_from_the_end(run / "metrics.jsonl", METRICS_BYTES)),
        metrics_s=modified_s(run / "metrics.jsonl"),
        checkpoint=checkpoint,
        partial=partial,
        supervisor=lines[-50:],
        troubles=reader.troubles,
    )


def _settings(reader: Reader, run: Path) -> dict[str, Any]:
    """The configuration that ranks read, or the one that they wrote."""
    for path in (run / CONFIG, run / "config.yaml"):
        text = reader.end_of(path, MAX_BYTES)
        if text:
            try:
                found = yaml.safe_load(text)
            except (yaml.YAMLError, ValueError, RecursionError) as error:
                reader.troubles.append(f"{path}: is not YAML ({' '.join(str(error).split())})")
                continue
            if isinstance(found, dict):
                return found
            reader.troubles.append(f"{path}: is no mapping")
    return {}


def _holder(reader: Reader, run: Path, now_s: float) -> tuple[Holder | None, bool | None]:
    text = reader.end_of(run / LOCK, MAX_BYTES).decode(errors="replace")
    if not text:
        return None, None
    try:
        holder = parse(run / LOCK, text)
    except LockedError as error:
        reader.troubles.append(str(error))
        return None, None
    if holder.process is None:
        return holder, None
    found = liveness(holder.process)
    if found is not Liveness.unknown:
        return holder, found is Liveness.alive
    stamp_s = modified_s(run / LOCK)
    return holder, None if stamp_s is None else abs(now_s - stamp_s) < BEAT_LIMIT_S


def _records(reader: Reader, attempts: Path) -> list[Record]:
    found: list[Record] = []
    names = sorted((name for name in reader.names_in(attempts) if name.isdecimal()), key=int)
    for name in names:
        # Without a look at what else is there: a run of months has millions of logs.
        folder = attempts / name
        values = reader.object_in(folder / RECORD)
        if not values and modified_s(folder / RECORD) is None:
            reader.troubles.append(f"{folder / RECORD}: is missing")
        record = Record(
            number=int(name),
            folder=folder,
            values=values,
            changed_s=modified_s(folder / RECORD) or modified_s(folder) or 0.0,
            has_ranks=name != names[-1] or any(each.startswith("rank_") for each in reader.names_in(folder)),
        )
        found.append(record)
    return found


def _checkpoints(reader: Reader, root: Path) -> tuple[Saved | None, Saved | None]:
    """The newest complete checkpoint, and the newest that is not complete."""
    newest: dict[bool, Saved] = {}
    for name in reader.names_in(root):
        match = _STEP.fullmatch(name)
        if match is None or len(match[1]) > 18:
            continue
        step, is_partial = int(match[1]), match[2] is not None
        at_s = (None if is_partial else modified_s(root / name / "manifest.json")) or modified_s(root / name)
        if at_s is not None and (is_partial not in newest or newest[is_partial].step < step):
            newest[is_partial] = Saved(step=step, at_s=at_s)
    return newest.get(False), newest.get(True)
