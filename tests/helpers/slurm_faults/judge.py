"""Whether a trial ended as it should: pure, over what was found."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

from k25_train.run_folder.rows_file import Row, number
from tests.helpers.slurm_faults.evidence import (
    FAILED,
    FINISHED,
    INTERVAL,
    Ended,
    Evidence,
    left_out,
    steps_lost,
)

OTHER_NODE_COUNT = 1e-5
"""Largest relative difference of a loss from the undisturbed run's, where the number of nodes changed."""
COMPARED = ("loss", "grad_norm", "eval_text_loss")
NUM_NODES = 2
"""On how many nodes every run starts."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Expected:
    """What a disturbance may do to a run."""

    outcomes: frozenset[str]
    """How an attempt may end that was disturbed."""
    told: tuple[str, ...] = ()
    """Patterns, each of which has to be in what people were told; `{node}` is the node that was hit."""
    alone: bool = True
    """Whether the run has to recover without anyone's help."""
    max_steps_lost: int = INTERVAL
    """How many steps a strike may cost."""
    strikes_to_exclude: int = 2
    """After how many strikes a node may be left out; 1 if SLURM itself or preflight finds it unfit."""
    has_to_exclude: bool = False
    """Whether the node has to be left out in the end, by a run that recovers alone."""
    max_attempts: int = 2
    """How many attempts the run may take in all."""
    lost_rows: frozenset[int] = field(default_factory=frozenset)
    """Steps whose metrics the disturbance itself destroys."""


def problems_of(
    expected: Expected, evidence: Evidence, num_strikes: int, reference: Sequence[Row]
) -> list[str]:
    """What was not right; empty if all was.

    Args:
        expected: what the disturbance may do.
        evidence: what was found.
        num_strikes: how often it was to take place.
        reference: the undisturbed run's metrics, without times.
    """
    checks = (_of_end(expected, evidence), _of_words(expected, evidence), _of_nodes(expected, evidence))
    found = [problem for check in checks for problem in check]
    if len(evidence.strikes) < num_strikes:
        found.insert(0, f"it took place {len(evidence.strikes)} of {num_strikes} times")
    found += evidence.more
    found += differences(expected, evidence, reference)
    return found + [f"left behind: {what}" for what in evidence.left]


def _of_end(expected: Expected, evidence: Evidence) -> Iterator[str]:
    """Did it recover, at which cost?"""
    last = evidence.attempts[-1].outcome if evidence.attempts else None
    if (evidence.state, last) != ("COMPLETED", FINISHED):
        yield f"it did not finish: job {evidence.state}, last attempt {last}"
    if evidence.continued_from is not None and expected.alone:
        yield f"it did not recover alone: job {evidence.continued_from}"
    for strike in evidence.strikes:
        for attempt in evidence.attempts:
            if attempt.number == strike.attempt and attempt.outcome not in expected.outcomes:
                wanted = " or ".join(sorted(expected.outcomes))
                yield f"attempt {attempt.number} ended {attempt.outcome} ({attempt.reason}), not {wanted}"
    limit = expected.max_steps_lost * len(evidence.strikes)
    if steps_lost(evidence) > limit:
        yield f"{steps_lost(evidence)} steps were lost, more than {limit}"
    if len(evidence.attempts) > expected.max_attempts:
        yield f"it took {len(evidence.attempts)} attempts, more than {expected.max_attempts}"


def _of_words(expected: Expected, evidence: Evidence) -> Iterator[str]:
    """Were people told?"""
    for pattern in expected.told:
        for node in {strike.node or "" for strike in evidence.strikes}:
            wanted = pattern.replace("{node}", re.escape(node))
            if not re.search(wanted, evidence.words, re.IGNORECASE):
                yield f"not told: {wanted}"
    for attempt in evidence.attempts:
        if attempt.outcome not in (None, FINISHED) and not attempt.reason:
            yield f"attempt {attempt.number} ended {attempt.outcome} without a reason"


def _of_nodes(expected: Expected, evidence: Evidence) -> Iterator[str]:
    """Was the right one left out, and no other?"""
    for attempt in evidence.attempts:
        seen = left_out(attempt, evidence.allocated.get(attempt.number, ()), NUM_NODES)
        for node in sorted(seen | {*attempt.left_out}):
            before = [strike for strike in evidence.strikes if strike.attempt < attempt.number]
            yield from _of_exclusion(f"attempt {attempt.number}", node, len(_hits(before, node)), expected)
    for node in sorted(evidence.excluded):
        yield from _of_exclusion("the job", node, len(_hits(evidence.strikes, node)), expected)
    # Who continues a run by hand has repaired the node before.
    if expected.has_to_exclude and evidence.attempts and evidence.continued_from is None:
        kept = {strike.node for strike in evidence.strikes} & set(evidence.attempts[-1].nodes)
        yield from (
            f"{node}, which was hit, is kept in the last attempt" for node in sorted(filter(None, kept))
        )
    for strike in evidence.strikes:
        for attempt in evidence.attempts:
            if attempt.number == strike.attempt:
                yield from _of_blame(attempt, strike.node)


def _hits(strikes: Sequence[object], node: str) -> list[object]:
    return [strike for strike in strikes if getattr(strike, "node", None) == node]


def _of_exclusion(who: str, node: str, num_hits: int, expected: Expected) -> Iterator[str]:
    if num_hits == 0:
        yield f"{who} leaves out {node}, which was not disturbed"
    elif num_hits < expected.strikes_to_exclude:
        yield f"{who} leaves out {node}, which was to blame only {num_hits} times"


def _of_blame(attempt: Ended, node: str | None) -> Iterator[str]:
    """The record names the node that was hit, or none."""
    if attempt.outcome == FAILED and attempt.blamed not in (None, node):
        yield f"attempt {attempt.number} blames {attempt.blamed} instead of {node}"


def differences(expected: Expected, evidence: Evidence, reference: Sequence[Row]) -> Iterator[str]:
    """In what the loss curve differs from the undisturbed run's: bitwise while the number of nodes stays."""
    is_exact = all(len(attempt.nodes) == NUM_NODES for attempt in evidence.attempts)
    steps = [number(row["step"]) for row in evidence.rows]
    twice = sorted({int(step) for step in steps if steps.count(step) > 1})
    if twice:
        yield f"steps are in the metrics twice: {twice}"
    found = {row["step"]: row for row in evidence.rows}
    missing = [row["step"] for row in reference if row["step"] not in {*found, *expected.lost_rows}]
    if missing:
        yield f"rows are missing: {missing}"
    for row in reference:
        other = found.get(row["step"])
        if other is not None and ((is_exact and other != row) or not _is_close(other, row)):
            names = [name for name in sorted({*row, *other}) if row.get(name) != other.get(name)]
            texts = [f"{name} {other.get(name)} instead of {row.get(name)}" for name in names]
            yield f"the row of step {row['step']} differs: {', '.join(texts)}"
            return


def _is_close(found: Row, wanted: Row) -> bool:
    for name in COMPARED:
        if name in wanted:
            # NaN for what is missing or not finite, which is close to nothing.
            value, goal = number(found.get(name)), number(wanted[name])
            if not abs(value - goal) <= OTHER_NODE_COUNT * abs(goal):
                return False
    return True
