"""The record of an attempt: when ranks were started, where, and how that ended. Pure."""

from dataclasses import dataclass, field
from enum import StrEnum

from launch.blame.verdict import Verdict


class Outcome(StrEnum):
    """How an attempt ended."""

    finished = "finished"
    """The last step is trained and saved."""
    stopped = "stopped"
    """The run was asked to stop: by the time limit, a preemption or an operator."""
    failed = "failed"
    """A rank failed or was killed on nodes that SLURM considers sound."""
    node_lost = "node_lost"
    """A node of the attempt is down, drained or not responding."""
    unfit = "unfit"
    """A node failed preflight, so no rank was started."""
    no_room = "no_room"
    """The run folder was full or could not be written, which is waited out."""
    vanished = "vanished"
    """The supervisor ended before it could record an outcome: lost with the first node, or by SIGKILL."""


NOT_COUNTED = (Outcome.stopped, Outcome.unfit, Outcome.no_room)
"""Outcomes that say nothing about the run itself. Unfit attempts are limited anyway: each excludes nodes."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Attempt:
    """One start of the ranks, as recorded in `attempts/<N>/attempt.json`."""

    number: int
    """Number of the attempt, from 1, across all jobs of the run."""
    job_id: int
    nodes: list[str]
    """Nodes that ran ranks."""
    code: str
    """Commit of the code."""
    outcome: str | None = None
    """An `Outcome`; None while the attempt is running."""
    reached: int | None = None
    """Last step that changed the weights, as far as the attempt came; None if it trained none."""
    saved: int | None = None
    """Step of the newest sound checkpoint when it ended, 0 if there was none; None if unknown."""
    skipped: int = 0
    """Steps at its end that changed nothing, since their gradient was not finite."""
    first_to_fail: str | None = None
    """Node of which srun reported a failure first; None if it reported none. `blame` has what it is worth."""
    blame: Verdict | None = None
    """Who ended it; None if that was not asked, or by an earlier version."""
    left_out: dict[str, str] = field(default_factory=dict)
    """Node -> why the attempt ran without it, of those that SLURM considers sound: it was to blame before."""
    passed_over: str = ""
    """Old name of a checkpoint that did not load and was set aside after this attempt; empty for none."""
    unfit: dict[str, str] = field(default_factory=dict)
    """Node -> why it failed preflight."""
    reason: str = ""
    """Description of the outcome."""
