"""Which ranks are meant, in words: whole nodes where it can be said so, ranges instead of lists."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import pairwise

MAX_RANGES = 8
"""Ranges that a list of numbers has; a job may have thousands of ranks."""
MAX_HOSTS = 3
"""Machines that are named of several."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Member:
    """A rank of the job, as it names itself."""

    rank: int
    node: int
    """Index of its node."""
    host: str
    """Name of its machine."""


def some_of(chosen: Sequence[Member], everyone: Sequence[Member]) -> str:
    """Some ranks of a job: `node 1 (host b, ranks 8-15)`, or `nodes 1, 3 and 5 to 31 (hosts b, d, f and 26
    more)`.

    Args:
        chosen: the ranks that are meant.
        everyone: all ranks of the job: a node all of whose ranks are meant is named as a whole.
    """
    chosen_ranks = {member.rank for member in chosen}
    split = {member.node for member in everyone if member.rank not in chosen_ranks}
    whole = [member for member in chosen if member.node not in split]
    parts = [member for member in chosen if member.node in split]
    return " and ".join(name(members) for name, members in ((_nodes, whole), (_ranks, parts)) if members)


def _nodes(members: Sequence[Member]) -> str:
    """All ranks of some nodes."""
    nodes = sorted({member.node for member in members})
    if len(nodes) > 1:
        return f"nodes {ranges(nodes)} ({_hosts(members)})"
    ranks = sorted({member.rank for member in members})
    is_range = len(ranks) > 1 and ranks[-1] - ranks[0] == len(ranks) - 1
    named = f"{ranks[0]}-{ranks[-1]}" if is_range else ranges(ranks)
    return f"node {nodes[0]} ({_hosts(members)}, {'rank' if len(ranks) == 1 else 'ranks'} {named})"


def _ranks(members: Sequence[Member]) -> str:
    """Some of the ranks of some nodes."""
    ranks = sorted({member.rank for member in members})
    nodes = sorted({member.node for member in members})
    of_nodes = f"node {nodes[0]}" if len(nodes) == 1 else f"nodes {ranges(nodes)}"
    return f"{'rank' if len(ranks) == 1 else 'ranks'} {ranges(ranks)} of {of_nodes} ({_hosts(members)})"


def _hosts(members: Sequence[Member]) -> str:
    by_rank = sorted(members, key=lambda member: member.rank)
    hosts = list(dict.fromkeys(member.host for member in by_rank))
    more = f" and {len(hosts) - MAX_HOSTS} more" if len(hosts) > MAX_HOSTS else ""
    return f"{'host' if len(hosts) == 1 else 'hosts'} {', '.join(hosts[:MAX_HOSTS])}{more}"


def ranges(numbers: Iterable[int]) -> str:
    """Numbers in words: `3`, `1 and 2`, `1, 3 and 5 to 31`; of many ranges the first few."""
    ordered = sorted(set(numbers))
    # A range begins where the number before is missing.
    starts = [0, *(index for index, (a, b) in enumerate(pairwise(ordered), 1) if b != a + 1), len(ordered)]
    runs = [ordered[start:end] for start, end in pairwise(starts)]
    texts: list[str] = []
    for run in runs[:MAX_RANGES]:
        texts += [f"{run[0]} to {run[-1]}"] if len(run) > 2 else [str(number) for number in run]
    left = sum(len(run) for run in runs[MAX_RANGES:])
    texts += [f"{left} more"] * bool(left)
    return texts[0] if len(texts) == 1 else f"{', '.join(texts[:-1])} and {texts[-1]}"
