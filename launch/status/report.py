"""The status of a run, which tables, JSON and Prometheus show. Every field is documented here."""

import statistics
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from itertools import islice
from pathlib import Path
from typing import Any

from k25_train.run_folder.alarm_rows import alarms_of
from launch.history import Outcome
from launch.status.blamed_log import BlamedLog, blamed_log
from launch.status.facts import Facts, Record, look
from launch.status.files import number
from launch.status.judging import MOVING, WILL_MOVE, State, judge, last_step, step_times
from launch.status.queue import Queue, QueuedJob

FORMAT_VERSION = 1
"""Of the JSON. It changes when a field goes or changes its meaning; new fields may come at any time."""
RECENT_STEPS = 20
MOST_ALARMS = 3
PLAN, OWN_MEDIAN = "plan", "own median"


@dataclass(frozen=True, slots=True, kw_only=True)
class Pace:
    """How fast the run is."""

    step_s: float
    """Seconds per step, median of the latest 20."""
    expected_step_s: float
    """What it is compared with."""
    expected_by: str
    """Where that is from: `plan`, that of `k25_train.plan`; or `own median`, of at most some
    hundred steps."""
    tokens_per_s: float | None


@dataclass(frozen=True, slots=True, kw_only=True)
class Checkpoints:
    """When the run was and will be saved; times in seconds since 1970."""

    newest_step: int | None
    newest_at_s: float | None
    next_step: int | None
    next_at_s: float | None
    """Expected."""


@dataclass(frozen=True, slots=True, kw_only=True)
class AttemptStatus:
    """One start of the ranks."""

    number: int
    job_id: int | None
    outcome: str | None
    """As in `attempt.json`; None while it is running, or unknown."""
    nodes: list[str]
    reached: int | None
    """Last step that changed the weights; None if it trained none."""
    saved: int | None
    """Step of the newest sound checkpoint at its end."""
    changed_at_s: float
    """When it ended, or started if it is running."""
    reason: str
    blamed_node: str | None
    """Node that was to blame for its end; None for none."""
    blamed_rank: int | None
    """Its rank, if it was one rank's doing."""


@dataclass(frozen=True, slots=True, kw_only=True)
class AlarmStatus:
    """A step that the run itself has told as an alarm (`metrics.alarms`)."""

    step: int
    name: str
    """`loss_spike`, `grad_spike/vision_tower`, and so on."""
    value: float
    usual: float
    text: str
    """What happened, in one line."""


@dataclass(frozen=True, slots=True, kw_only=True)
class RunStatus:
    """Everything that is known of a run."""

    run: str
    """The run folder, absolute."""
    at_s: float
    """When it was looked at, in seconds since 1970."""
    state: State
    why: str
    model: str | None
    job: QueuedJob | None
    """What squeue says of its job; None if it has none, or SLURM has forgotten it."""
    step: int | None
    """Last step that was finished."""
    steps: int | None
    """`train.steps`."""
    loss: float | None
    grad_norm: float | None
    learning_rate: float | None
    last_step_at_s: float | None
    pace: Pace | None
    """None before a few steps were finished."""
    checkpoints: Checkpoints
    ends_at_s: float | None
    """Expected end; None if the run is not going on."""
    attempts: list[AttemptStatus]
    left_out: dict[str, str]
    """Node of the job that runs no ranks, or was excluded -> why."""
    alarms: list[AlarmStatus]
    """The latest 3 among the latest steps, newest first."""
    blamed_log: BlamedLog | None
    """The end of the log that says what went wrong; None if nothing did."""
    troubles: list[str]
    """Files that could not be read."""

    def as_json(self) -> dict[str, Any]:
        """Plain values."""
        return {"format_version": FORMAT_VERSION, **asdict(self), "state": self.state.value}


def status_of(run: Path, queue: Queue, now_s: float | None = None) -> RunStatus:
    """The status of a run; never raises on what is in its folder."""
    return conclude(look(run, now_s), queue)


def conclude(facts: Facts, queue: Queue) -> RunStatus:
    """What the facts amount to."""
    found, pace, step = judge(facts, queue), pace_of(facts), last_step(facts)
    job = None if facts.job_id is None else queue.jobs.get(facts.job_id)
    attempts = [attempt_status(record) for record in facts.records]
    newest: dict[str, Any] = facts.rows[0] if facts.rows else {}
    start = starting_point(facts, found.state)
    ends_at_s = None
    if pace and start and facts.steps:
        ends_at_s = max(facts.now_s, start[1] + pace.step_s * (facts.steps - start[0]))
    return RunStatus(
        run=str(facts.run.absolute()),
        at_s=facts.now_s,
        state=found.state,
        why=found.why,
        model=text(facts.setting("model", "name")),
        job=job,
        step=step,
        steps=facts.steps,
        loss=number(next((row["loss"] for row in facts.rows if "loss" in row), None)),
        grad_norm=number(newest.get("grad_norm")),
        learning_rate=number(newest.get("lr")),
        last_step_at_s=facts.metrics_s if facts.rows else None,
        pace=pace,
        checkpoints=checkpoints_of(facts, pace, start),
        ends_at_s=ends_at_s,
        attempts=attempts,
        left_out=left_out(facts, job, attempts),
        alarms=latest_alarms(facts),
        blamed_log=blamed_log(facts, found.state),
        troubles=facts.troubles,
    )


def pace_of(facts: Facts) -> Pace | None:
    """How fast the run is; None before three steps."""
    times = step_times(facts)
    if len(times) < 3:
        return None
    planned_s = number(facts.submission.get("planned_step_s"))
    tokens = [number(row.get("tokens_per_s")) for row in facts.rows[:RECENT_STEPS]]
    known = [each for each in tokens if each is not None]
    return Pace(
        step_s=statistics.median(times[:RECENT_STEPS]),
        expected_step_s=planned_s or statistics.median(times),
        expected_by=PLAN if planned_s else OWN_MEDIAN,
        tokens_per_s=statistics.median(known) if known else None,
    )


def starting_point(facts: Facts, state: State) -> tuple[int, float] | None:
    """A step and when it was, or could be, done, from which times are foreseen; None if nothing moves."""
    step, saved = last_step(facts), facts.checkpoint
    if state in MOVING and step is not None and facts.metrics_s is not None:
        return step, facts.metrics_s
    if state in WILL_MOVE:
        return 0 if saved is None else saved.step, facts.now_s
    return None


def checkpoints_of(facts: Facts, pace: Pace | None, start: tuple[int, float] | None) -> Checkpoints:
    """The newest checkpoint and the next."""
    steps, newest = facts.steps, facts.checkpoint
    interval = number(facts.setting("checkpoint", "interval"))
    next_step = next_at_s = None
    if start is not None and interval and interval >= 1 and steps:
        next_step = min(steps, (start[0] // int(interval) + 1) * int(interval))
        if facts.partial is not None and facts.partial.step == start[0]:
            # It is being written.
            next_step = start[0]
        if pace:
            next_at_s = max(facts.now_s, start[1] + pace.step_s * (next_step - start[0]))
    return Checkpoints(
        newest_step=newest.step if newest else None,
        newest_at_s=newest.at_s if newest else None,
        next_step=next_step,
        next_at_s=next_at_s,
    )


def attempt_status(record: Record) -> AttemptStatus:
    """An attempt, from a record of any version."""
    values, blame = record.values, mapping(record.values.get("blame"))
    return AttemptStatus(
        number=record.number,
        job_id=whole(values.get("job_id")),
        outcome=text(values.get("outcome")),
        nodes=texts(values.get("nodes")),
        reached=whole(values.get("reached")),
        saved=whole(values.get("saved")),
        changed_at_s=record.changed_s,
        reason=text(values.get("reason")) or "",
        blamed_node=text(blame.get("node")) if blame else text(values.get("first_to_fail")),
        blamed_rank=whole(blame.get("rank")),
    )


def left_out(facts: Facts, job: QueuedJob | None, attempts: Sequence[AttemptStatus]) -> dict[str, str]:
    """Nodes that the run does not use any more, of the job that it belongs to."""
    found: dict[str, str] = {}
    own = [record for record in facts.records if record.values.get("job_id") == facts.job_id]
    for record in own:
        for node, why in mapping(record.values.get("unfit")).items():
            found[node] = f"failed the preflight of attempt {record.number}: {why}"
    # What the newest one says of itself; of an earlier version, whom it does without after a fault.
    current = set(attempts[-1].nodes) if attempts else set()
    for node, why in mapping(own[-1].values.get("left_out")).items() if own else ():
        found[node] = str(why)
    for attempt in attempts:
        is_fault = attempt.outcome in (Outcome.failed, Outcome.node_lost)
        for node in attempt.nodes if is_fault and attempt.job_id == facts.job_id else ():
            if node == attempt.blamed_node:
                found.setdefault(node, f"attempt {attempt.number} {attempt.outcome}: {attempt.reason}")
    return {node: why for node, why in found.items() if node not in current}


def latest_alarms(facts: Facts) -> list[AlarmStatus]:
    """Alarms of the newest rows."""
    found = (alarm for row in facts.rows for alarm in alarms_of(row))
    return [
        AlarmStatus(step=each.step, name=each.name, value=each.value, usual=each.usual, text=each.short)
        for each in islice(found, MOST_ALARMS)
    ]


def mapping(value: object) -> dict[str, Any]:
    """A mapping; empty for anything else."""
    return value if isinstance(value, dict) else {}


def text(value: object) -> str | None:
    """A text; None for anything else."""
    return value if isinstance(value, str) and value else None


def texts(value: object) -> list[str]:
    """A list of texts; empty for anything else."""
    return [each for each in value if isinstance(each, str)] if isinstance(value, list) else []


def whole(value: object) -> int | None:
    """A whole number; None for anything else."""
    return value if isinstance(value, int) and not isinstance(value, bool) else None
