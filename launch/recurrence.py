"""What recurs in the history of a job: nodes to blame, failures, checkpoints that do not load. Pure."""

import re
from collections.abc import Collection, Sequence
from itertools import pairwise

from launch.blame.verdict import Confidence, Kind
from launch.history import NOT_COUNTED, Attempt, Outcome

CONVINCING = (Confidence.certain, Confidence.strong)
"""Verdicts of which two, at any time, are enough to do without a node."""


def may_pass_over(history: Sequence[Attempt]) -> bool:
    """Whether a checkpoint that does not load may be passed over: not if the last attempts did so already,
    without a step since then."""
    for attempt in reversed(history):
        if attempt.passed_over:
            return False
        if attempt.reached is not None:
            return True
    return True


def reason_of_checkpoint(history: Sequence[Attempt]) -> str | None:
    """Why the run cannot go on from any checkpoint, or None."""
    last = history[-1] if history else None
    if last is None or last.blame is None or last.blame.kind != Kind.checkpoint or last.passed_over:
        return None
    earlier = next((attempt.passed_over for attempt in reversed(history) if attempt.passed_over), "")
    if earlier and not may_pass_over(history):
        return f"neither {earlier} nor {last.blame.checkpoint} loads: {last.blame.reason}"
    return f"{last.blame.reason}; no other one is there to go on from"


def reason_of_recurrence(history: Sequence[Attempt], avoidable: Collection[str]) -> str | None:
    """Why the last two failures are no accident, or None."""
    ended = [each for each in history if each.outcome not in NOT_COUNTED and not each.passed_over]
    last_two = ended[-2:]
    if len(last_two) < 2 or any(attempt.outcome != Outcome.failed for attempt in last_two):
        return None
    before, last = last_two
    error = same_named_error(before, last)
    if before.reached != last.reached and not (error and last.reached is None):
        return None
    # Without the node that was to blame, it may not recur; that is tried once.
    culprit = same_culprit(before, last)
    tried = (
        len(ended) > 2 and same_culprit(ended[-3], before) == culprit and ended[-3].reached == before.reached
    )
    if culprit in avoidable and not error and not tried:
        return None
    where = "before its first step" if last.reached is None else f"after step {last.reached}"
    said = f" ({error})" if error else ""
    return (
        f"attempts {before.number} and {last.number} both failed {where}{with_skipped(last)}: "
        f"this is no accident{said}"
    )


def same_culprit(before: Attempt, last: Attempt) -> str | None:
    """The node to which strong evidence of both attempts points, or None."""
    nodes = [
        attempt.blame.node
        for attempt in (before, last)
        if attempt.blame is not None and attempt.blame.confidence in CONVINCING
    ]
    return nodes[0] if len(nodes) == 2 and nodes[0] == nodes[1] else None


def same_named_error(before: Attempt, last: Attempt) -> str:
    """The error of settings, data or checkpoints that ended both attempts; empty if there is none.

    Numbers in it may differ, such as the free space of a disk. Restarts do not help, whichever node had it.
    """
    if before.blame is None or last.blame is None:
        return ""
    found = [
        blame.error for blame in (before.blame, last.blame) if blame.kind in (Kind.shared, Kind.named_error)
    ]
    texts = {re.sub(r"\d+", "#", text) for text in found}
    return found[1].strip().splitlines()[0] if len(found) == 2 and len(texts) == 1 and found[1] else ""


def with_skipped(attempt: Attempt) -> str:
    """What to add about an attempt whose last steps changed nothing; empty for others."""
    if not attempt.skipped:
        return ""
    return (
        f" (attempt {attempt.number} then skipped {attempt.skipped} steps, whose gradients were not finite: "
        "lower optim.lr or look at their data; the last checkpoint with finite steps is kept)"
    )


def suspects(history: Sequence[Attempt]) -> dict[str, str]:
    """Node -> why, of those that were to blame twice; SLURM may consider them sound.

    Weak evidence counts if it points to a node in two consecutive failures, other evidence whenever it does.
    """
    failed = [attempt for attempt in history if attempt.outcome in (Outcome.failed, Outcome.node_lost)]
    blamed: dict[str, list[int]] = {}
    for attempt in failed:
        if attempt.blame is not None and attempt.blame.node and attempt.blame.confidence in CONVINCING:
            blamed.setdefault(attempt.blame.node, []).append(attempt.number)
    for before, last in pairwise(failed):
        node = accused(last)
        if node is not None and node == accused(before):
            blamed[node] = sorted({*blamed.get(node, []), before.number, last.number})
    reasons = {attempt.number: attempt.blame.reason for attempt in failed if attempt.blame is not None}
    return {
        node: f"it was to blame in attempts {', '.join(map(str, numbers))}; "
        + reasons.get(numbers[-1], "srun reported it first")
        for node, numbers in blamed.items()
        if len(numbers) > 1
    }


def accused(attempt: Attempt) -> str | None:
    """The node to which any evidence of an attempt points; for a record without a verdict, srun's."""
    return attempt.first_to_fail if attempt.blame is None else attempt.blame.node
