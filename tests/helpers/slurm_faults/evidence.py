"""What is found after a trial: plain data, which tests of the judge make up."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from k25_train.run_folder.rows_file import Row

NUM_STEPS, INTERVAL = 24, 6
"""Of every run: its steps, and after how many it saves."""


FINISHED, STOPPED, FAILED = "finished", "stopped", "failed"
NODE_LOST, VANISHED, NO_ROOM = "node_lost", "vanished", "no_room"
"""How an attempt may end, by its record."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Ended:
    """What an attempt's record says when all is over."""

    number: int
    nodes: Sequence[str]
    outcome: str | None
    """None if the record was never closed."""
    reached: int | None = None
    """Its last step; None if it trained none."""
    blamed: str | None = None
    """The node to blame; None if none is said to be."""
    left_out: Sequence[str] = ()
    """Nodes that it says it did without because they were to blame before."""
    reason: str = ""


@dataclass(frozen=True, slots=True, kw_only=True)
class Strike:
    """One disturbance that took place."""

    attempt: int
    """Number of the attempt that was running."""
    node: str | None
    """The node that it hit; None if it hit no node in particular."""
    step: int
    """The newest step in the metrics; 0 before the first."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Evidence:
    """What a trial left, and what was seen of it meanwhile."""

    strikes: Sequence[Strike]
    attempts: Sequence[Ended]
    state: str
    """The run's job when all was over, such as COMPLETED."""
    continued_from: str | None = None
    """State in which the run needed an `sbatch` to go on; None if it recovered alone."""
    words: str
    """What people were told: supervisor's lines, reasons of the attempts, comments of the job."""
    rows: Sequence[Row]
    """The metrics, without times."""
    resumed: Mapping[int, int]
    """Attempt -> the step after which it went on, of those that trained; 0 from the beginning."""
    allocated: Mapping[int, Sequence[str]] = field(default_factory=dict)
    """Attempt -> the job's nodes meanwhile, of those that were seen running."""
    excluded: Sequence[str] = ()
    """Nodes that the job is not to get any more (ExcNodeList), at the end."""
    left: Sequence[str] = ()
    """What is still there and should not be: processes, files, jobs."""
    more: Sequence[str] = ()
    """What the disturbance itself found wrong, such as a second submission that was not refused."""


def steps_lost(evidence: Evidence) -> int:
    """How many steps had to be trained again."""
    lost, reached = 0, 0
    for attempt in evidence.attempts:
        if attempt.number in evidence.resumed:
            lost += max(0, reached - evidence.resumed[attempt.number])
            reached = evidence.resumed[attempt.number]
        reached = max(reached, attempt.reached or 0)
    return lost


def left_out(attempt: Ended, allocated: Sequence[str], num_wanted: int) -> set[str]:
    """Nodes of the job that the attempt might have used and did not.

    Args:
        attempt: the attempt.
        allocated: the job's nodes, in SLURM's order.
        num_wanted: how many the run uses if it can.
    """
    others = [node for node in allocated if node not in attempt.nodes]
    if len(attempt.nodes) < num_wanted:
        return set(others)
    places = [place for place, node in enumerate(allocated) if node in attempt.nodes]
    return {node for node in others if places and allocated.index(node) < places[-1]}
