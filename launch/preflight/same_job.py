"""Whether all ranks would run the same: what training compares at its start, before it costs anything."""

from collections.abc import Sequence
from typing import NamedTuple

from k25_train.config.schema import Config
from k25_train.errors import K25Error
from k25_train.joining.agreement import (
    Difference,
    Facts,
    Kind,
    Statement,
    differences,
    digest,
    line_of,
    to_ask,
    with_nodes,
)
from k25_train.joining.facts import AT_START, DATA, data_facts_of, facts_at_start, with_notes
from launch.preflight.coordination import Coordinator
from launch.preflight.findings import Finding, failed, passed, skipped

STATE_TIMEOUT_S = 60.0
"""Time within which every rank must have said what it would run."""
DATA_TIMEOUT_S = 1800.0
"""Time within which every node must have read the index of the data: seconds per million samples."""
MAX_NAMED = 4
"""Facts that a line names."""
UNREADABLE = "unreadable"
"""Fact of a node that cannot read the data: why."""

Findings = dict[int, list[Finding]]
"""Node leader -> its findings."""


class Told(NamedTuple):
    """What a rank tells the others."""

    host: str
    """Name of its node."""
    topic: str
    kinds: Sequence[Kind]
    facts: Facts


def compare_job(config: Config, coordinator: Coordinator, host: str) -> Findings:
    """Compare what ranks would run and read; on rank 0, the findings of all nodes.

    Called by every rank; one that is silent does not hold up the others for long.
    """
    if len(coordinator.node_leaders) == 1:
        reason = "a single node has nothing to be compared with"
        return {0: [skipped(kind.name, reason) for kind in (*AT_START, DATA)]}
    everyone = range(coordinator.world_size)
    own = Told(host, "start", AT_START, facts_at_start(config))
    at_start = _compare(coordinator, own, everyone, STATE_TIMEOUT_S)
    of_data = data_facts(config) if coordinator.is_node_leader else {}
    own = Told(host, "data", [DATA], {DATA.name: of_data})
    read = _compare(coordinator, own, coordinator.node_leaders, DATA_TIMEOUT_S)
    return {leader: at_start[leader] + read[leader] for leader in at_start}


def data_facts(config: Config) -> dict[str, str]:
    """What the data on this node are, or why they cannot be read."""
    try:
        return data_facts_of(config)
    except K25Error as error:
        return {UNREADABLE: str(error)}
    except OSError as error:
        return {UNREADABLE: f"{error.filename or config.data.dir}: {error.strerror or error}"}


def _compare(coordinator: Coordinator, own: Told, ranks: Sequence[int], timeout_s: float) -> Findings:
    # 1. All state a digest, in no time; rank 0 asks one rank for each that differs.
    node, local_rank = divmod(coordinator.rank, coordinator.ranks_per_node)
    statement = Statement(
        rank=coordinator.rank,
        node=node,
        host=own.host,
        local_rank=local_rank,
        digests={kind: digest(values) for kind, values in own.facts.items()},
    )
    coordinator.publish(f"{own.topic} statement", statement)
    said: list[Statement] = []
    if coordinator.is_first:
        heard = coordinator.collect(f"{own.topic} statement", ranks, Statement, timeout_s)
        said = list(heard.values())
    asked = to_ask(said, own.kinds) if coordinator.is_first else None
    asked = coordinator.share(f"{own.topic} asked", asked, dict[str, list[int]], 2 * timeout_s) or {}
    # 2. They tell their values.
    to_answer = sorted({rank for chosen in asked.values() for rank in chosen})
    if coordinator.rank in to_answer:
        coordinator.publish(f"{own.topic} values", with_notes({kind: own.facts[kind] for kind in asked}))
    if not coordinator.is_first:
        return {}
    values = coordinator.collect(f"{own.topic} values", to_answer, dict[str, dict[str, str]], STATE_TIMEOUT_S)
    found = differences(said, values, own.kinds)
    return judge_agreement(found, said, own.kinds, own.facts, coordinator.node_leaders)


def judge_agreement(
    found: Sequence[Difference],
    said: Sequence[Statement],
    kinds: Sequence[Kind],
    own: Facts,
    leaders: Sequence[int],
) -> Findings:
    """Node leader -> a finding of each kind: failed where a node differs from most.

    Args:
        found: what differs.
        said: statements of the ranks that answered.
        kinds: what was compared.
        own: facts of rank 0.
        leaders: the first rank of every node.
    """
    findings: Findings = {leader: [] for leader in leaders}
    answered = {statement.node for statement in said}
    for kind in kinds:
        odd = nodes_that_differ([one for one in found if one.kind == kind], said)
        for node, leader in enumerate(leaders):
            if node in odd:
                lines = [line_of(one, said) for one in odd[node]]
                more = f"; and {len(lines) - MAX_NAMED} more" if len(lines) > MAX_NAMED else ""
                text = "; ".join(lines[:MAX_NAMED]) + more
                finding = failed(kind.name, text, "has to be the same on all ranks", kind.remedy)
            elif node not in answered:
                finding = skipped(kind.name, "the node did not answer in time")
            elif UNREADABLE in own.get(kind.name, {}) and not odd:
                finding = skipped(kind.name, f"no node can read it: {own[kind.name][UNREADABLE]}")
            else:
                finding = passed(kind.name, f"{len(own.get(kind.name, {}))} facts as on the other nodes")
            findings[leader].append(finding)
    return findings


def nodes_that_differ(found: Sequence[Difference], said: Sequence[Statement]) -> dict[int, list[Difference]]:
    """Node -> the facts that one of its ranks does not have as most ranks do."""
    odd: dict[int, list[Difference]] = {}
    for one in found:
        rare = [statement for _, group in one.values[1:] for statement in with_nodes(group, one.kind, said)]
        for node in dict.fromkeys(statement.node for statement in rare):
            odd.setdefault(node, []).append(one)
    return odd
