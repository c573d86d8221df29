"""Restart policy: pure decisions, given the history of attempts, on whether and where to try again."""

from collections.abc import Collection, Iterable, Sequence
from itertools import takewhile

from launch.history import NOT_COUNTED, Attempt, Outcome
from launch.recurrence import reason_of_checkpoint, reason_of_recurrence, with_skipped

LONGEST_WAIT_S = 900.0
"""Upper limit of the pause before a restart."""
MAX_UNSAVED = 20
"""Limit of consecutive faults without a newer checkpoint: each attempt may have come a step further."""
MAX_NO_ROOM = 50
"""Limit of consecutive attempts whose checkpoint had no room in the run folder, in spite of the waiting: with
a quarter of an hour between them, half a day."""
MAX_FRUITLESS_STOPS = 10
"""Limit of consecutive stops without progress: each costs a start of the job."""


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


def reason_to_give_up(
    history: Sequence[Attempt], max_restarts: int, avoidable: Collection[str] = ()
) -> str | None:
    """Why no further attempt makes sense, or None.

    A failure that recurs at the same step is no accident, unless a node was to blame that the next attempt
    can do without. Other failures may be accidents as long as attempts make progress; up to `max_restarts` in
    a row may make none. Attempts that SLURM stopped count for neither, up to `MAX_FRUITLESS_STOPS`. Nor do
    those that failed preflight, unless every node did: then the fault lies in what the nodes share. Nor does
    one whose checkpoint is passed over; a checkpoint that is not is a reason to give up at once.

    Args:
        history: the job's attempts, oldest first.
        max_restarts: how many in a row may fail without progress.
        avoidable: nodes without each of which the run could go on.
    """
    # 1. Stopped, or without room, again and again.
    if (hindered := _reason_of_hindrance(history)) is not None:
        return hindered
    # 2. Every node failed preflight.
    last_one = history[-1] if history else None
    if last_one is not None and 1 < len(last_one.nodes) == len(last_one.unfit):
        return (
            f"all {len(last_one.nodes)} nodes of attempt {last_one.number} failed preflight: the cluster's "
            "file or the fabric is wrong rather than each node (see preflight.log; submitted with "
            "cluster.slurm.preflight=false, the run starts regardless)"
        )
    # 3. A checkpoint that does not load, and is not passed over; or twice the same failure.
    if (unloadable := reason_of_checkpoint(history)) is not None:
        return unloadable
    if (again := reason_of_recurrence(history, avoidable)) is not None:
        return again
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


def _reason_of_hindrance(history: Sequence[Attempt]) -> str | None:
    """Why the run does not come further though nothing fails, or None."""
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
    return None


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
