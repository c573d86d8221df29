"""Measured rates held against each other and against the plan: which rank, node or connection is slow.

A rank is compared with the median of its peers, and so is a connection with those of its kind; the scatter is
the median absolute deviation, so that a few slow ones do not hide themselves. Both are taken of logarithms:
what is slow is slow by a factor, and scatter as wide as the rates themselves must not hide it.
"""

import math
import statistics
from collections.abc import Collection, Hashable, Mapping, Sequence
from dataclasses import dataclass
from enum import Enum

from launch.preflight.findings import Finding, Verdict, passed, skipped

MIN_PEERS = 3
"""Fewer values have no middle to be far from."""
SIGMAS = 4.0
"""Scatters below the median from which on a value is no chance."""
SIGMA_PER_DEVIATION = 1.4826
"""Standard deviation over median absolute deviation, for normal scatter."""
FAILING_SHARE = 0.5
"""Share of the median below which the whole job would be held up."""


class Reach(Enum):
    """Connections of one reach are peers of each other, whatever is sent over them."""

    within = "within a node"
    between = "between nodes"


@dataclass(frozen=True, slots=True, kw_only=True)
class Link:
    """A measured connection between two ranks."""

    pair: tuple[int, int]
    gb_per_s: float
    """Bytes in each direction, both at once, in units of 1e9 a second."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Bar:
    """How far values may lie below the others."""

    tolerance: float
    """Share of the median below which a value may be an outlier, however small the scatter."""
    fails: bool
    """Whether very slow ones fail; where ranks share cores chance alone may make one slow, and they only
    warn."""

    def verdict(self, value: float, median: float) -> Verdict:
        """Of an outlier."""
        return Verdict.failed if self.fails and value < FAILING_SHARE * median else Verdict.warned


def outliers[Key: Hashable](values: Mapping[Key, float], tolerance: float) -> dict[Key, float]:
    """The values, all positive, that lie below the others by more than their scatter and by more than
    `tolerance`, a share of the median; none of fewer than `MIN_PEERS`."""
    if len(values) < MIN_PEERS:
        return {}
    logs = {key: math.log(value) for key, value in values.items()}
    median = statistics.median(logs.values())
    deviation = statistics.median(abs(value - median) for value in logs.values())
    limit = median - max(SIGMAS * SIGMA_PER_DEVIATION * deviation, -math.log(1 - tolerance))
    return {key: value for key, value in values.items() if logs[key] < limit}


def judge_ranks(
    check: str, unit: str, values: Mapping[int, float], nodes: Mapping[int, str], bar: Bar
) -> dict[str, Finding]:
    """Node -> finding on the rates of its ranks; `nodes` has the node of every rank."""
    slow = outliers(values, bar.tolerance)
    findings = {}
    for node in set(nodes.values()):
        own = {rank: rate for rank, rate in values.items() if nodes[rank] == node}
        own_slow = {rank: rate for rank, rate in slow.items() if rank in own}
        if own_slow:
            median = statistics.median(values.values())
            findings[node] = Finding(
                check=check,
                verdict=max(bar.verdict(rate, median) for rate in own_slow.values()),
                found=", ".join(f"rank {rank}: {rate:.3g} {unit}" for rank, rate in own_slow.items()),
                rule=f"the median over all ranks is {median:.3g} {unit}",
                remedy="drain the node, or look for other load, heat and power on it",
            )
        elif own:
            findings[node] = passed(check, f"{' to '.join(_ends(own.values()))} {unit}")
        else:
            findings[node] = skipped(check, "no rank came to it")
    return findings


def _ends(rates: Collection[float]) -> list[str]:
    """The lowest and the highest, once if they look alike."""
    return list(dict.fromkeys(f"{rate:.3g}" for rate in (min(rates), max(rates))))


def judge_links(check: str, links: Sequence[Link], nodes: Mapping[int, str], bar: Bar) -> dict[str, Finding]:
    """Node -> finding on the connections of its ranks; at least one was measured."""
    slow = slow_ranks(links, nodes, bar.tolerance)
    bad = slow_links(links, nodes, bar.tolerance, slow)
    median = medians(links, nodes)
    findings = {}
    for node in set(nodes.values()):
        own_slow = {rank: link for rank, link in slow.items() if nodes[rank] == node}
        own_bad = [link for link in bad if node in _ends_of(link, nodes)]
        suspects = [*own_slow.values(), *own_bad]
        if not suspects:
            findings[node] = passed(check, f"median {_told(median)}")
            continue
        told = [f"rank {rank}: at best {link.gb_per_s:.3g} GB/s" for rank, link in own_slow.items()]
        told += [f"ranks {link.pair[0]} and {link.pair[1]}: {link.gb_per_s:.3g} GB/s" for link in own_bad]
        findings[node] = Finding(
            check=check,
            verdict=max(bar.verdict(link.gb_per_s, median[_reach(link, nodes)]) for link in suspects),
            found=", ".join(told),
            rule=f"the median is {_told(median)}",
            remedy="check cards, cables and switch ports of these ranks; drain the node",
        )
    return findings


def slow_ranks(links: Sequence[Link], nodes: Mapping[int, str], tolerance: float) -> dict[int, Link]:
    """Rank -> its best connection, for the ranks whose best is an outlier: they are slow whomever they meet.

    The neighbour of a slow rank has good connections to others, so it is not among them.
    """
    best: dict[Reach, dict[int, Link]] = {reach: {} for reach in Reach}
    for link in links:
        by_rank = best[_reach(link, nodes)]
        for rank in link.pair:
            if rank not in by_rank or link.gb_per_s > by_rank[rank].gb_per_s:
                by_rank[rank] = link
    slow: dict[int, Link] = {}
    for by_rank in best.values():
        rates = {rank: link.gb_per_s for rank, link in by_rank.items()}
        slow |= {rank: by_rank[rank] for rank in outliers(rates, tolerance)}
    return slow


def slow_links(
    links: Sequence[Link], nodes: Mapping[int, str], tolerance: float, without: Collection[int]
) -> list[Link]:
    """Connections that are slow though neither end is; `without` are the slow ranks."""
    found = []
    for reach in Reach:
        peers = [link for link in links if _reach(link, nodes) is reach and not set(link.pair) & set(without)]
        slow = outliers({link.pair: link.gb_per_s for link in peers}, tolerance)
        found += [link for link in peers if link.pair in slow]
    return found


def medians(links: Sequence[Link], nodes: Mapping[int, str]) -> dict[Reach, float]:
    """Median rate of the connections of each reach that there are."""
    rates = {reach: [link.gb_per_s for link in links if _reach(link, nodes) is reach] for reach in Reach}
    return {reach: statistics.median(values) for reach, values in rates.items() if values}


def _ends_of(link: Link, nodes: Mapping[int, str]) -> set[str]:
    return {nodes[rank] for rank in link.pair}


def _reach(link: Link, nodes: Mapping[int, str]) -> Reach:
    return Reach.within if len(_ends_of(link, nodes)) == 1 else Reach.between


def _told(median: Mapping[Reach, float]) -> str:
    return ", ".join(f"{rate:.3g} GB/s {reach.value}" for reach, rate in median.items())
