"""Finds outliers among measured rates: which rank, node or connection is slow.

A rank is compared with the median of its peers, a connection with the median of its kind. Scatter is measured
by the median absolute deviation, which a few slow ones cannot inflate to hide themselves. Both are taken of
logarithms: slowness is a factor, and scatter as wide as the rates themselves must not hide it.
"""

import math
import statistics
from collections.abc import Collection, Hashable, Mapping, Sequence
from dataclasses import dataclass
from enum import Enum

from launch.preflight.findings import Finding, Verdict, passed, skipped

MIN_PEERS = 3
"""Smallest number of values among which outliers are looked for."""
SIGMAS = 4.0
"""Distance below the median, in standard deviations, from which a value is not due to chance."""
SIGMA_PER_DEVIATION = 1.4826
"""Standard deviation / median absolute deviation of a normal distribution."""
FAILING_SHARE = 0.5
"""Share of the median below which a node fails, since it would slow down the whole job."""


class Scope(Enum):
    """Which connections are compared with each other, whatever is sent over them."""

    within = "within a node"
    between = "between nodes"


@dataclass(frozen=True, slots=True, kw_only=True)
class Link:
    """A measured connection between two ranks."""

    pair: tuple[int, int]
    gb_per_s: float
    """Rate in each direction with both in use, in 1e9 bytes per second."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Threshold:
    """How far values may be below the others."""

    tolerance: float
    """Smallest distance of an outlier from the median, as a share of the median."""
    fails: bool
    """Whether very slow ones fail; on shared cores, where chance alone makes ranks slow, they only warn."""

    def verdict(self, value: float, median: float) -> Verdict:
        """The verdict on an outlier."""
        return Verdict.failed if self.fails and value < FAILING_SHARE * median else Verdict.warned


def outliers[Key: Hashable](values: Mapping[Key, float], tolerance: float) -> dict[Key, float]:
    """Those of the values, all positive, that are below the median by more than the scatter allows, and by
    more than `tolerance`, a share of the median; none if there are fewer than `MIN_PEERS`."""
    if len(values) < MIN_PEERS:
        return {}
    logs = {key: math.log(value) for key, value in values.items()}
    median = statistics.median(logs.values())
    deviation = statistics.median(abs(value - median) for value in logs.values())
    limit = median - max(SIGMAS * SIGMA_PER_DEVIATION * deviation, -math.log(1 - tolerance))
    return {key: value for key, value in values.items() if logs[key] < limit}


def judge_ranks(
    check: str, unit: str, values: Mapping[int, float], nodes: Mapping[int, str], threshold: Threshold
) -> dict[str, Finding]:
    """Node -> finding on the rates of its ranks; `values` maps ranks to rates, `nodes` ranks to nodes."""
    slow = outliers(values, threshold.tolerance)
    findings = {}
    for node in set(nodes.values()):
        own = {rank: rate for rank, rate in values.items() if nodes[rank] == node}
        own_slow = {rank: rate for rank, rate in slow.items() if rank in own}
        if own_slow:
            median = statistics.median(values.values())
            findings[node] = Finding(
                check=check,
                verdict=max(threshold.verdict(rate, median) for rate in own_slow.values()),
                found=", ".join(f"rank {rank}: {rate:.3g} {unit}" for rank, rate in own_slow.items()),
                rule=f"the median over all ranks is {median:.3g} {unit}",
                remedy="drain the node, or check it for other load, heat and power",
            )
        else:
            measured = f"{' to '.join(_lowest_and_highest(own.values()))} {unit}" if own else ""
            findings[node] = _passed_if_all(check, measured, own, _ranks_of(node, nodes))
    return findings


def _ranks_of(node: str, nodes: Mapping[int, str]) -> list[int]:
    return [rank for rank, own in nodes.items() if own == node]


def _passed_if_all(check: str, measured: str, done: Collection[int], ranks: Sequence[int]) -> Finding:
    """Passed if all `ranks` of a node are among those that were measured, `done`; skipped otherwise."""
    missing = [rank for rank in ranks if rank not in done]
    if len(missing) == len(ranks):
        return skipped(check, "no rank got to it")
    if missing:
        return skipped(check, f"ranks {missing} did not get to it; the others: {measured}")
    return passed(check, measured)


def _lowest_and_highest(rates: Collection[float]) -> list[str]:
    """The lowest and the highest rate in text; only one if they read the same."""
    return list(dict.fromkeys(f"{rate:.3g}" for rate in (min(rates), max(rates))))


def judge_links(
    check: str, links: Sequence[Link], nodes: Mapping[int, str], threshold: Threshold
) -> dict[str, Finding]:
    """Node -> finding on the connections of its ranks; `links` is not empty."""
    # A rank is slow if all its connections are; otherwise single connections may be.
    slow = slow_ranks(links, nodes, threshold.tolerance)
    bad = slow_links(links, nodes, threshold.tolerance, slow)
    median = medians(links, nodes)
    connected = {rank for link in links for rank in link.pair}
    findings = {}
    for node in set(nodes.values()):
        own_slow = {rank: link for rank, link in slow.items() if nodes[rank] == node}
        own_bad = [link for link in bad if node in _nodes_of(link, nodes)]
        suspects = [*own_slow.values(), *own_bad]
        if not suspects:
            findings[node] = _passed_if_all(
                check, f"median {_format(median)}", connected, _ranks_of(node, nodes)
            )
            continue
        texts = [f"rank {rank}: at best {link.gb_per_s:.3g} GB/s" for rank, link in own_slow.items()]
        texts += [f"ranks {link.pair[0]} and {link.pair[1]}: {link.gb_per_s:.3g} GB/s" for link in own_bad]
        findings[node] = Finding(
            check=check,
            verdict=max(
                threshold.verdict(link.gb_per_s, median[_scope_of(link, nodes)]) for link in suspects
            ),
            found=", ".join(texts),
            rule=f"the median is {_format(median)}",
            remedy="check cards, cables and switch ports of these ranks; drain the node",
        )
    return findings


def slow_ranks(links: Sequence[Link], nodes: Mapping[int, str], tolerance: float) -> dict[int, Link]:
    """Slow ranks -> their best connection: ranks whose best connection is an outlier.

    A peer of a slow rank has good connections to others, so it is not among them.
    """
    best: dict[Scope, dict[int, Link]] = {scope: {} for scope in Scope}
    for link in links:
        by_rank = best[_scope_of(link, nodes)]
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
    """Slow connections between ranks that are not slow themselves; `without` are the slow ranks."""
    found = []
    for scope in Scope:
        peers = [
            link for link in links if _scope_of(link, nodes) is scope and not set(link.pair) & set(without)
        ]
        slow = outliers({link.pair: link.gb_per_s for link in peers}, tolerance)
        found += [link for link in peers if link.pair in slow]
    return found


def medians(links: Sequence[Link], nodes: Mapping[int, str]) -> dict[Scope, float]:
    """Median rate of the connections of each scope; a scope without connections is left out."""
    rates = {scope: [link.gb_per_s for link in links if _scope_of(link, nodes) is scope] for scope in Scope}
    return {scope: statistics.median(values) for scope, values in rates.items() if values}


def _nodes_of(link: Link, nodes: Mapping[int, str]) -> set[str]:
    return {nodes[rank] for rank in link.pair}


def _scope_of(link: Link, nodes: Mapping[int, str]) -> Scope:
    return Scope.within if len(_nodes_of(link, nodes)) == 1 else Scope.between


def _format(median: Mapping[Scope, float]) -> str:
    return ", ".join(f"{rate:.3g} GB/s {scope.value}" for scope, rate in median.items())
