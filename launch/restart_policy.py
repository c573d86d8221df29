"""Restart policy: pure decisions, given the history of attempts, on whether and where to try again."""

from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass, field
from enum import StrEnum
from itertools import pairwise, takewhile

LONGEST_WAIT_S = 900.0
"""Upper limit of the pause before a restart."""
MAX_UNSAVED = 20
"""Limit of consecutive faults without a newer checkpoint: each attempt may have come a step further."""
MAX_NO_ROOM = 50
"""Limit of consecutive attempts whose checkpoint had no room in the run folder, in spite of the waiting: with
a quarter of an hour between them, half a day."""
MAX_FRUITLESS_STOPS = 10
"""Limit of consecutive stops without progress: each costs a start of the job."""


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
    """Node whose ranks failed first; None if none failed."""
    unfit: dict[str, str] = field(default_factory=dict)
    """Node -> why it failed preflight."""
    reason: str = ""
    """Description of the outcome."""


def outcome_of(
    status: int, reached: int | None, num_steps: int, *, asked_to_stop: bool, lost: Collection[str]
) -> Outcome:
    """How an attempt ended.

    Args:
        status: srun's exit status; ranks that save and stop exit with 0.
        reached: last step in the metrics.
        num_steps: number of steps of the whole run.
        asked_to_stop: whether SLURM asked the supervisor to stop.
        lost: nodes of the attempt that are no longer usable.
    """
    if status == 0 and reached is not None and reached >= num_steps:
        return Outcome.finished
    if asked_to_stop or status == 0:
        return Outcome.stopped
    return Outcome.node_lost if lost else Outcome.failed


def reason_to_give_up(history: Sequence[Attempt], max_restarts: int) -> str | None:
    """Why no further attempt makes sense, or None.

    A failure that recurs at the same step is no accident. Other failures may be accidents as long as attempts
    make progress; up to `max_restarts` in a row may make none. Attempts that SLURM stopped count for neither,
    up to `MAX_FRUITLESS_STOPS`. Nor do those that failed preflight, unless every node did: then the fault
    lies in what the nodes share.
    """
    # 1. Stopped again and again without progress.
    idle = num_fruitless_stops(history)
    if idle > MAX_FRUITLESS_STOPS:
        return (
            f"{idle} attempts in a row were stopped before they trained another step: leave more time before "
            "the end (cluster.slurm.time_limit_min, stop_before_end_s), or find out why they are preempted"
        )
    without_room = num_without_room(history)
    if without_room > MAX_NO_ROOM:
        return (
            f"the run folder had no room for a checkpoint in {without_room} attempts in a row: make room, "
            "raise the quota, or keep fewer checkpoints (checkpoint.keep)"
        )
    # 2. Every node failed preflight.
    last_one = history[-1] if history else None
    if last_one is not None and 1 < len(last_one.nodes) == len(last_one.unfit):
        return (
            f"all {len(last_one.nodes)} nodes of attempt {last_one.number} failed preflight: the cluster's "
            "file or the fabric is wrong rather than each node (see preflight.log; submitted with "
            "cluster.slurm.preflight=false, the run starts regardless)"
        )
    # 3. Two failures at the same step.
    ended = [attempt for attempt in history if attempt.outcome not in NOT_COUNTED]
    last_two = ended[-2:]
    if len(last_two) == 2 and all(attempt.outcome == Outcome.failed for attempt in last_two):
        before, last = last_two
        if before.reached == last.reached:
            where = "before its first step" if last.reached is None else f"after step {last.reached}"
            return (
                f"attempts {before.number} and {last.number} both failed {where}{with_skipped(last)}: "
                "this is no accident"
            )
    # 4. Further each time, but what was gained is lost each time.
    unsaved = num_unsaved(history)
    if unsaved > MAX_UNSAVED:
        return (
            f"{unsaved} attempts in a row failed before the next checkpoint, the newest is of step "
            f"{history[-1].saved}: save more often (checkpoint.interval), or find out why they fail"
        )
    # 5. Too many restarts without progress.
    fruitless = num_fruitless(history)
    if fruitless > max_restarts:
        skipped = with_skipped(history[-1])
        return (
            f"{fruitless} attempts in a row made no progress{skipped}, --max-restarts {max_restarts} are "
            "allowed"
        )
    return None


def with_skipped(attempt: Attempt) -> str:
    """What to add about an attempt whose last steps changed nothing; empty for others."""
    if not attempt.skipped:
        return ""
    return (
        f" (attempt {attempt.number} then skipped {attempt.skipped} steps, whose gradients were not finite: "
        "lower optim.lr or look at their data; the last checkpoint with finite steps is kept)"
    )


def num_fruitless_stops(history: Sequence[Attempt]) -> int:
    """Number of attempts at the end of the history that were stopped before getting beyond earlier ones."""
    furthest, fruitless = 0, 0
    for attempt in history:
        gets_further = attempt.reached is not None and attempt.reached > furthest
        furthest = max(furthest, attempt.reached or 0)
        fruitless = fruitless + 1 if attempt.outcome == Outcome.stopped and not gets_further else 0
    return fruitless


def num_without_room(history: Sequence[Attempt]) -> int:
    """Number of attempts at the end of the history whose checkpoint had no room."""
    return len(list(takewhile(lambda attempt: attempt.outcome == Outcome.no_room, reversed(history))))


def num_fruitless(history: Sequence[Attempt]) -> int:
    """Number of attempts at the end of the history that did not get beyond the furthest earlier step."""
    furthest, fruitless = 0, 0
    for attempt in history:
        if attempt.reached is not None and attempt.reached > furthest:
            furthest, fruitless = attempt.reached, 0
        if attempt.outcome not in (*NOT_COUNTED, Outcome.finished):
            fruitless += 1
    return fruitless


def num_unsaved(history: Sequence[Attempt]) -> int:
    """Number of attempts at the end of the history that ended by a fault and left no newer checkpoint."""
    newest, unsaved = -1, 0
    for attempt in history:
        if attempt.saved is None or attempt.saved > newest:
            newest, unsaved = attempt.saved if attempt.saved is not None else newest, 0
        if attempt.saved is not None and attempt.outcome not in (*NOT_COUNTED, Outcome.finished):
            unsaved += 1
    return unsaved


def wait_before_restart_s(history: Sequence[Attempt], shortest_s: float) -> float:
    """Pause before the next attempt; it doubles with every attempt that made no progress, or had no room."""
    doublings = min(30, max(0, num_fruitless(history) - 1, num_without_room(history) - 1))
    return min(LONGEST_WAIT_S, shortest_s * 2**doublings)


def suspects(history: Sequence[Attempt]) -> set[str]:
    """Nodes that failed first in two consecutive failures; SLURM may still consider them sound."""
    failed = [attempt for attempt in history if attempt.outcome == Outcome.failed]
    return {
        last.first_to_fail
        for before, last in pairwise(failed)
        if last.first_to_fail is not None and last.first_to_fail == before.first_to_fail
    }


def choose_nodes(allocated: Sequence[str], unfit: Iterable[str], legal_counts: Sequence[int]) -> list[str]:
    """As many sound nodes as the run may use, in SLURM's order; none if there are too few."""
    unfit = set(unfit)
    sound = [node for node in allocated if node not in unfit]
    return sound[: max((count for count in legal_counts if count <= len(sound)), default=0)]


def nodes_for(
    allocated: Sequence[str], unusable: Collection[str], suspected: Collection[str], legal: Sequence[int]
) -> list[str]:
    """The nodes of the next attempt; suspected ones only if the run could not go on without them."""
    return choose_nodes(allocated, {*unusable, *suspected}, legal) or choose_nodes(allocated, unusable, legal)
