"""Who ended an attempt: a node, a rank, or what all of them share. Pure: from evidence to a verdict.

Every rule looks at the evidence in one way and accuses nodes, or what they share. The strongest accusations
count; where they name several nodes, the one that was clearly first, and no node if none was: what happens to
several at once is no node's fault. README.md has the table.
"""

from collections.abc import Callable, Iterator, Sequence

from launch.blame import node_rules, rank_rules
from launch.blame.evidence import Evidence
from launch.blame.rank_rules import own_ends
from launch.blame.verdict import STRENGTH, Accusation, Confidence, Verdict

SAME_MOMENT_S = 5.0
"""Ends this close are not told apart: nodes' clocks differ, and torchrun looks at its ranks now and then."""

RULES: Sequence[Callable[[Evidence], Iterator[Accusation]]] = (*node_rules.RULES, *rank_rules.RULES)
"""Each looks at the evidence by itself; which of their accusations counts is `STRENGTH`'s."""


def judge(evidence: Evidence) -> Verdict:
    """Who ended the attempt."""
    accusations = [accusation for rule in RULES for accusation in rule(evidence)]
    if not accusations:
        return Verdict(reason="nothing tells why: see the logs of ranks and nodes")
    strongest = max(STRENGTH[each.kind][0] for each in accusations)
    found = [each for each in accusations if STRENGTH[each.kind][0] == strongest]
    accused = first_of(found)
    if accused is None:
        nodes = ", ".join(sorted({each.node for each in found if each.node}))
        return Verdict(
            kind=found[0].kind,
            reason=f"{found[0].reason}; {nodes} alike, so it is no single node's fault",
            error=error_in(evidence),
        )
    return Verdict(
        node=accused.node,
        rank=accused.rank,
        kind=accused.kind,
        reason=accused.reason,
        confidence=STRENGTH[accused.kind][1] if accused.node else Confidence.none,
        error=error_in(evidence),
        checkpoint=accused.checkpoint,
        instead=accused.instead,
    )


def first_of(accusations: Sequence[Accusation]) -> Accusation | None:
    """The accusation that counts among equally strong ones; None if they contradict each other."""
    first = min(accusations, key=lambda each: (each.at_s is None, each.at_s or 0.0, each.rank or 0))
    others = [each for each in accusations if each.node != first.node]
    if first.at_s is not None and all(
        each.at_s is not None and each.at_s - first.at_s > SAME_MOMENT_S for each in others
    ):
        return first
    return None if others else first


def error_in(evidence: Evidence) -> str:
    """The first error that ranks named, other than that a peer is gone; empty if there is none."""
    named = [end for end in own_ends(evidence) if end.error and end.error.text and not end.error.is_of_peer]
    if not named:
        return ""
    error = min(named, key=lambda end: (not (end.error and end.error.is_shared), end.at_s)).error
    assert error is not None
    return f"{error.kind}: {error.text}"
