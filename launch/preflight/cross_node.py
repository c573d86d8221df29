"""What must agree on all nodes: versions and clocks."""

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass

from launch.preflight.findings import Finding, failed, passed, skipped, warned

VERSIONS, CLOCK = "versions", "clock"
TOLERATED = ("kernel", "card firmware")
"""Versions whose difference only warns: jobs run, but it may explain why a node behaves differently."""
MAX_SKEW_S = 0.5
"""Largest clock offset with which logs and traces of different nodes can be ordered. Our choice."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Offset:
    """Offset of a node's clock from that of rank 0's node."""

    seconds: float
    """Offset; positive if the node is ahead."""
    uncertainty_s: float
    """Half the duration of the exchange that measured the offset."""


def judge_versions(versions: Mapping[str, Mapping[str, str]]) -> dict[str, Finding]:
    """Node -> finding on its versions, compared with those of most nodes."""
    if len(versions) < 2:
        return {node: skipped(VERSIONS, "a single node has nothing to be compared with") for node in versions}
    names = sorted({name for own in versions.values() for name in own})
    usual = {
        name: Counter(own.get(name, "absent") for own in versions.values()).most_common(1)[0][0]
        for name in names
    }
    findings = {}
    for node, own in versions.items():
        odd = {name: own.get(name, "absent") for name in names if own.get(name, "absent") != usual[name]}
        if odd:
            found = ", ".join(f"{name} {value}" for name, value in odd.items())
            rule = f"other nodes have {', '.join(f'{name} {usual[name]}' for name in odd)}"
            judge = warned if set(odd) <= set(TOLERATED) else failed
            findings[node] = judge(VERSIONS, found, rule, "start all nodes from one image and one checkout")
        else:
            findings[node] = passed(VERSIONS, f"{len(names)} as on the other nodes")
    return findings


def judge_clocks(offsets: Mapping[str, Offset | None], reference: str) -> dict[str, Finding]:
    """Node -> finding on its clock, compared with `reference`, rank 0's node; None if the node is silent."""
    findings = {reference: passed(CLOCK, "the others are compared with it")}
    if not offsets:
        findings[reference] = skipped(CLOCK, "a single node has nothing to be compared with")
    elif not any(offsets.values()):
        findings[reference] = skipped(CLOCK, "no other node answered")
    for node, offset in offsets.items():
        if offset is None:
            findings[node] = skipped(CLOCK, "the node did not answer")
            continue
        found = f"{1e3 * offset.seconds:+.1f} ms (± {1e3 * offset.uncertainty_s:.1f} ms) against {reference}"
        if abs(offset.seconds) - offset.uncertainty_s > MAX_SKEW_S:
            rule = f"nodes should agree within {1e3 * MAX_SKEW_S:g} ms"
            findings[node] = warned(CLOCK, found, rule, "check chronyd or ntpd on the node")
        else:
            findings[node] = passed(CLOCK, found)
    return findings
