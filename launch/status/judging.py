"""In which state a run is, from the facts: pure. README.md has the table of states."""

import re
import statistics
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import datetime
from enum import StrEnum

from k25_train.run_folder.jobs import ENDED
from k25_train.run_folder.record import SINCE_FORMAT
from k25_train.units import format_duration
from launch.history import Outcome
from launch.status.facts import Facts, Record
from launch.status.files import number
from launch.status.queue import Queue, QueuedJob

STALLED_STEPS, STALLED_S = 10.0, 120.0
"""A run that trains has stalled after so many of its own steps' time without one, and at least so long."""
_GIVEN_UP = re.compile(r"GIVEN UP: (.*?)(?:\. The first errors are in .*)?$")
_ERROR = re.compile(r"\] (\w+(?:Error|Exception): .*)")
_STAMP = re.compile(r"^\[[\d: -]+\] ")


class State(StrEnum):
    """What becomes of a run."""

    new = "new"
    """A folder in which nothing has started."""
    queued = "queued"
    requeued = "requeued"
    """In the queue again, after a stop or a fault."""
    suspended = "suspended"
    starting = "starting"
    """Ranks start, and have not finished a step."""
    preflight = "preflight"
    training = "training"
    saving = "saving"
    stalled = "stalled"
    """Trains, but no step was finished for long."""
    between = "between attempts"
    """The supervisor waits before it starts ranks again, or looks for nodes."""
    finished = "finished"
    stopped = "stopped"
    """Ended before its last step as it was asked to, or by an error that it told; it can go on."""
    cancelled = "cancelled"
    given_up = "given up"
    failed = "failed"
    """Its job ended with an error."""
    lost = "lost"
    """It ended without a word: killed, or its node was lost."""
    unknown = "unknown"
    """SLURM cannot be asked, or files do not tell."""


GOING_ON = (
    State.queued, State.requeued, State.suspended, State.starting, State.preflight, State.training,
    State.saving, State.stalled, State.between,
)  # fmt: skip
"""States of a run that needs nobody, perhaps but for the stalled one."""
MOVING = (State.training, State.saving)
"""States in which steps come one after the other, so that times can be foreseen from the last one."""
WILL_MOVE = (State.starting, State.preflight, State.between)
"""States in which ranks have yet to go on from the newest checkpoint."""
TROUBLED = (State.given_up, State.failed, State.lost, State.stalled, State.unknown)
"""States that somebody should look at."""
_OUTCOMES: Mapping[str, State] = {
    Outcome.finished: State.finished, Outcome.stopped: State.stopped, Outcome.vanished: State.lost,
}  # fmt: skip


@dataclass(frozen=True, slots=True)
class Judgement:
    """A state and why."""

    state: State
    why: str
    """In words; empty where the state says it all."""


def last_step(facts: Facts) -> int | None:
    """The last step in the metrics."""
    return int(facts.rows[0]["step"]) if facts.rows else None


def is_finished(facts: Facts) -> bool:
    """Whether the last step is saved."""
    steps = facts.steps
    return steps is not None and facts.checkpoint is not None and facts.checkpoint.step >= steps


def judge(facts: Facts, queue: Queue) -> Judgement:
    """The state of a run."""
    job_id = facts.job_id
    job = None if job_id is None else queue.jobs.get(job_id)
    if is_finished(facts) and not (facts.is_alive and job is None):
        return Judgement(State.finished, "")
    if job_id is None:
        return _by_hand(facts)
    if job is not None and job.state not in ENDED:
        return _going_on(facts, job)
    if job is None and facts.is_alive:
        # Whatever SLURM can or cannot say: a rank renews the lock.
        return _phase(facts, _newest_of(facts, job_id))
    newest = _newest_of(facts, job_id)
    if job is None and queue.trouble and (newest is None or newest.values.get("outcome") is None):
        return Judgement(State.unknown, f"SLURM cannot be asked about job {job_id}: {queue.trouble}")
    return _ended(facts, job_id, job)


def _by_hand(facts: Facts) -> Judgement:
    holder, step, steps = facts.holder, last_step(facts), facts.steps
    if holder is not None and holder.process is not None:
        if facts.is_alive:
            return _phase(facts, None)
        return Judgement(State.lost, f"{holder.describe()} ended without a word, or its machine is down")
    if step is None and facts.checkpoint is None:
        if facts.troubles:
            return Judgement(State.unknown, "its files cannot be read")
        return Judgement(State.new, "")
    at = "" if step is None or steps is None else f"at step {step:,} of {steps:,}; "
    return Judgement(State.stopped, f"{at}the same command goes on from there")


def _going_on(facts: Facts, job: QueuedJob) -> Judgement:
    newest = _newest_of(facts, job.id)
    if job.state in ("RUNNING", "COMPLETING", "STAGE_OUT", "SIGNALING"):
        return _phase(facts, newest) if newest is not None or facts.is_alive else _waits(facts)
    if job.state in ("SUSPENDED", "STOPPED"):
        return Judgement(State.suspended, f"by SLURM, job {job.id}")
    why = f"job {job.id} is {job.state}" + (f" ({job.reason})" if job.reason else "")
    if newest is None:
        return Judgement(State.queued, why)
    reason = newest.values.get("reason")
    return Judgement(State.requeued, f"{why}; before: {reason}" if reason else why)


def _phase(facts: Facts, attempt: Record | None) -> Judgement:
    """What a run that lives does at the moment; `attempt` is None for one that was started by hand."""
    if attempt is not None and attempt.values.get("outcome") is not None:
        return _waits(facts)
    step, metrics_s = last_step(facts), facts.metrics_s
    since_s = held_since_s(facts) if attempt is None else attempt.changed_s
    partial = facts.partial
    if step is not None and partial is not None and partial.step == step and partial.at_s >= since_s:
        return Judgement(State.saving, f"step {step:,}")
    if step is None or metrics_s is None or metrics_s < since_s:
        is_checking = attempt is not None and facts.submission.get("preflight") and not attempt.has_ranks
        return Judgement(State.preflight if is_checking else State.starting, "")
    # Is there a step now and then?
    silent_s, limit_s = facts.now_s - metrics_s, STALLED_S
    times = step_times(facts)
    if times:
        limit_s = max(STALLED_S, STALLED_STEPS * statistics.median(times))
    if silent_s > limit_s:
        return Judgement(State.stalled, f"no step for {format_duration(silent_s)}")
    return Judgement(State.training, "")


def held_since_s(facts: Facts) -> float:
    """When the process that has the lock took it, in seconds since 1970; 0 if it does not tell."""
    try:
        return datetime.strptime(facts.holder.since if facts.holder else "", SINCE_FORMAT).timestamp()
    except ValueError:
        return 0.0


def _waits(facts: Facts) -> Judgement:
    return Judgement(State.between, _last_word(facts))


def _ended(facts: Facts, job_id: int, job: QueuedJob | None) -> Judgement:
    """A run whose job is over."""
    newest = _newest_of(facts, job_id)
    if job is not None and job.state == "CANCELLED":
        return Judgement(State.cancelled, f"job {job_id}; `sbatch {facts.run}/submit.sbatch` goes on")
    for line in reversed(facts.supervisor):
        match = _GIVEN_UP.search(line)
        if match is not None:
            return Judgement(State.given_up, match[1])
        error = _ERROR.search(line)
        if error is not None:
            return Judgement(State.failed, error[1])
        if " starts on " in line:
            break
    if newest is None or newest.values.get("outcome") is None:
        return Judgement(
            State.lost, f"job {job_id} is over, and its supervisor recorded nothing about its end"
        )
    outcome, reason = str(newest.values["outcome"]), str(newest.values.get("reason") or "")
    return Judgement(_OUTCOMES.get(outcome, State.failed), f"attempt {newest.number} {outcome}: {reason}")


def _newest_of(facts: Facts, job_id: int) -> Record | None:
    """The newest attempt of a job; one whose record is damaged may be its."""
    for record in reversed(facts.records):
        if not record.values or record.values.get("job_id") == job_id:
            return record
    return None


def _last_word(facts: Facts) -> str:
    """The supervisor's last line, without its time."""
    return _STAMP.sub("", facts.supervisor[-1]) if facts.supervisor else ""


def step_times(facts: Facts) -> list[float]:
    """Seconds of the latest steps, newest first."""
    found = [number(row.get("step_time_s")) for row in facts.rows]
    return [seconds for seconds in found if seconds is not None and seconds > 0]
