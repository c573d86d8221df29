"""What to do after an attempt: pure decisions on what has happened so far."""

from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass, field
from enum import StrEnum
from itertools import pairwise

LONGEST_WAIT_S = 900.0
MAX_FRUITLESS_STOPS = 10
"""Stops in a row that may get no further: each costs the job's start."""


class Outcome(StrEnum):
    """How an attempt ended."""

    finished = "finished"
    """The last step is trained and saved."""
    stopped = "stopped"
    """Somebody asked for it: the time limit, a preemption, an operator."""
    failed = "failed"
    """A rank ended with an error, or was killed, on nodes that SLURM finds sound."""
    node_lost = "node_lost"
    """A node of the attempt is down, drained or does not respond."""
    unfit = "unfit"
    """A node failed the preflight, so no rank was started."""
    vanished = "vanished"
    """Its supervisor was gone before it could tell, with the first node or by SIGKILL."""


COUNT_FOR_NOTHING = (Outcome.stopped, Outcome.unfit)
"""Outcomes that say nothing of the run itself. Unfit ones end with the nodes, as each leaves some out."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Attempt:
    """One start of the ranks, as `attempts/<N>/attempt.json` keeps it."""

    number: int
    """Counts from 1 over all jobs of the run."""
    job_id: int
    nodes: list[str]
    """Those that ran ranks."""
    code: str
    """Commit of the code."""
    outcome: str | None = None
    """An `Outcome`; None while it runs."""
    reached: int | None = None
    """Last step that it trained; None if it trained none."""
    first_to_fail: str | None = None
    """The node whose ranks failed first, if any did."""
    unfit: dict[str, str] = field(default_factory=dict)
    """Node -> why it failed the preflight."""
    reason: str = ""
    """The outcome in words."""


def outcome_of(
    status: int, reached: int | None, num_steps: int, *, asked_to_stop: bool, lost: Collection[str]
) -> Outcome:
    """How an attempt ended.

    Args:
        status: exit status of srun; ranks that save and stop end with 0.
        reached: last step in the metrics.
        num_steps: steps of the whole run.
        asked_to_stop: whether SLURM told the supervisor to stop.
        lost: nodes of the attempt that are no longer usable.
    """
    if status == 0 and reached is not None and reached >= num_steps:
        return Outcome.finished
    if asked_to_stop or status == 0:
        return Outcome.stopped
    return Outcome.node_lost if lost else Outcome.failed


def reason_to_give_up(history: Sequence[Attempt], max_restarts: int) -> str | None:
    """Why no further attempt makes sense, or None.

    A failure that comes back at the same step is no accident. Others may be accidents as long as attempts get
    further; those that do not may be `max_restarts` in a row. What SLURM stopped counts for neither, up to
    `MAX_FRUITLESS_STOPS`. Nor does what the preflight did, unless it found no node sound: then the fault lies
    in what they share.
    """
    idle = num_fruitless_stops(history)
    if idle > MAX_FRUITLESS_STOPS:
        return (
            f"{idle} attempts in a row were stopped before they trained a step more: leave more time before "
            "the end (cluster.slurm.time_limit_min, stop_before_end_s), or see why they are preempted"
        )
    last_one = history[-1] if history else None
    if last_one is not None and 1 < len(last_one.nodes) == len(last_one.unfit):
        return (
            f"all {len(last_one.nodes)} nodes of attempt {last_one.number} failed preflight: the cluster's "
            "file or the fabric is wrong rather than each of them (preflight.log says what; submitted with "
            "cluster.slurm.preflight=false, the run starts nevertheless)"
        )
    ended = [attempt for attempt in history if attempt.outcome not in COUNT_FOR_NOTHING]
    last_two = ended[-2:]
    if len(last_two) == 2 and all(attempt.outcome == Outcome.failed for attempt in last_two):
        before, last = last_two
        if before.reached == last.reached:
            where = "before its first step" if last.reached is None else f"after step {last.reached}"
            return f"attempts {before.number} and {last.number} both failed {where}: this is no accident"
    fruitless = num_fruitless(history)
    if fruitless > max_restarts:
        return f"{fruitless} attempts in a row got no further, --max-restarts {max_restarts} are allowed"
    return None


def num_fruitless_stops(history: Sequence[Attempt]) -> int:
    """Attempts at the end of the history that were stopped and did not get beyond the step before them."""
    furthest, fruitless = 0, 0
    for attempt in history:
        gets_further = attempt.reached is not None and attempt.reached > furthest
        furthest = max(furthest, attempt.reached or 0)
        fruitless = fruitless + 1 if attempt.outcome == Outcome.stopped and not gets_further else 0
    return fruitless


def num_fruitless(history: Sequence[Attempt]) -> int:
    """Attempts at the end of the history that did not get beyond the furthest step before them."""
    furthest, fruitless = 0, 0
    for attempt in history:
        if attempt.reached is not None and attempt.reached > furthest:
            furthest, fruitless = attempt.reached, 0
        if attempt.outcome not in (*COUNT_FOR_NOTHING, Outcome.finished):
            fruitless += 1
    return fruitless


def wait_before_restart_s(history: Sequence[Attempt], shortest_s: float) -> float:
    """Seconds before the next attempt: twice as long after each one that got no further."""
    return min(LONGEST_WAIT_S, shortest_s * 2 ** max(0, num_fruitless(history) - 1))


def suspects(history: Sequence[Attempt]) -> set[str]:
    """Nodes that failed first in two attempts in a row, which SLURM may still find sound."""
    failed = [attempt for attempt in history if attempt.outcome == Outcome.failed]
    return {
        last.first_to_fail
        for before, last in pairwise(failed)
        if last.first_to_fail is not None and last.first_to_fail == before.first_to_fail
    }


def choose_nodes(allocated: Sequence[str], unfit: Iterable[str], legal_counts: Sequence[int]) -> list[str]:
    """As many sound nodes as the run may have, in SLURM's order; none if they are too few."""
    unfit = set(unfit)
    sound = [node for node in allocated if node not in unfit]
    return sound[: max((count for count in legal_counts if count <= len(sound)), default=0)]


def nodes_for(
    allocated: Sequence[str], unusable: Collection[str], suspected: Collection[str], legal: Sequence[int]
) -> list[str]:
    """The nodes of the next attempt; suspected ones only where the run could not go on without them."""
    return choose_nodes(allocated, {*unusable, *suspected}, legal) or choose_nodes(allocated, unusable, legal)
