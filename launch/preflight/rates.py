"""Measured rates held against each other and against the plan: which rank, node or connection is slow.

A rank is compared with the median of its peers, and so is a connection with those of its kind; the scatter is
the median absolute deviation, so that a few slow ones do not hide themselves.
"""

import statistics
from collections import defaultdict
from collections.abc import Collection, Hashable, Mapping, Sequence
from dataclasses import dataclass

from launch.preflight.findings import Finding, Verdict, passed, skipped
from launch.preflight.groups import Exchange

MIN_PEERS = 3
"""Fewer values have no middle to be far from."""
SIGMAS = 4.0
"""Scatters below the median from which on a value is no chance."""
SIGMA_PER_DEVIATION = 1.4826
"""Standard deviation over median absolute deviation, for normal scatter."""
FAILING_SHARE = 0.5
"""Share of the median below which the whole job would be held up."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Link:
    """A measured connection between two ranks."""

    exchange: Exchange
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
    """The values that lie below the others by more than their scatter and by more than `tolerance`; none of
    fewer than `MIN_PEERS`."""
    if len(values) < MIN_PEERS:
        return {}
    median = statistics.median(values.values())
    deviation = statistics.median(abs(value - median) for value in values.values())
    limit = median - max(SIGMAS * SIGMA_PER_DEVIATION * deviation, tolerance * median)
    return {key: value for key, value in values.items() if value < limit}


def judge_ranks(
    check: str, unit: str, values: Mapping[int, float], nodes: Mapping[int, str], bar: Bar
) -> dict[str, Finding]:
    """Node -> finding on the rates of its ranks; `nodes` has the node of every rank."""
    if len(values) < MIN_PEERS:
        return {
            node: passed(check, _told(check_ranks(values, nodes, node), unit)) for node in set(nodes.values())
        }
    median = statistics.median(values.values())
    slow = outliers(values, bar.tolerance)
    findings = {}
    for node in set(nodes.values()):
        own = check_ranks(values, nodes, node)
        own_slow = {rank: rate for rank, rate in slow.items() if rank in own}
        if own_slow:
            verdict = max(bar.verdict(rate, median) for rate in own_slow.values())
            findings[node] = Finding(
                check=check,
                verdict=verdict,
                found=", ".join(f"rank {rank}: {rate:.3g} {unit}" for rank, rate in own_slow.items()),
                rule=f"the median over all ranks is {median:.3g} {unit}",
                remedy="drain the node, or look for other load, heat and power on it",
            )
        else:
            findings[node] = passed(check, _told(own, unit))
    return findings


def check_ranks(values: Mapping[int, float], nodes: Mapping[int, str], node: str) -> dict[int, float]:
    """The values of the ranks of a node."""
    return {rank: value for rank, value in values.items() if nodes[rank] == node}


def _told(values: Mapping[int, float], unit: str) -> str:
    rates = list(values.values())
    if not rates:
        return "no rank measured"
    if len(rates) == 1:
        return f"{rates[0]:.3g} {unit}"
    return f"{min(rates):.3g} to {max(rates):.3g} {unit}"


def slow_ranks(links: Sequence[Link], nodes: Mapping[int, str], tolerance: float) -> dict[int, Link]:
    """Rank -> its best connection, for the ranks whose best is an outlier: they are slow whomever they meet.

    The neighbour of a slow rank has good connections to others, so it is not among them. Connections within a
    node and between nodes are no peers of each other.
    """
    best: dict[tuple[Exchange, bool], dict[int, Link]] = defaultdict(dict)
    for link in links:
        by_rank = best[_kind(link, nodes)]
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
    by_kind: dict[tuple[Exchange, bool], list[Link]] = defaultdict(list)
    for link in links:
        if not set(link.pair) & set(without):
            by_kind[_kind(link, nodes)].append(link)
    found = []
    for kind in by_kind.values():
        slow = outliers({link.pair: link.gb_per_s for link in kind}, tolerance)
        found += [link for link in kind if link.pair in slow]
    return found


def _kind(link: Link, nodes: Mapping[int, str]) -> tuple[Exchange, bool]:
    first, second = link.pair
    return link.exchange, nodes[first] == nodes[second]


def medians(links: Sequence[Link], nodes: Mapping[int, str]) -> dict[tuple[Exchange, bool], float]:
    """(exchange, whether within a node) -> median rate."""
    rates: dict[tuple[Exchange, bool], list[float]] = defaultdict(list)
    for link in links:
        rates[_kind(link, nodes)].append(link.gb_per_s)
    return {kind: statistics.median(values) for kind, values in rates.items()}


def judge_links(check: str, links: Sequence[Link], nodes: Mapping[int, str], bar: Bar) -> dict[str, Finding]:
    """Node -> finding on the connections of its ranks, all of one exchange."""
    if not links:
        return {node: skipped(check, "no pair was measured") for node in set(nodes.values())}
    slow = slow_ranks(links, nodes, bar.tolerance)
    bad_links = slow_links(links, nodes, bar.tolerance, slow)
    middle = medians(links, nodes)
    findings = {}
    for node in set(nodes.values()):
        own_slow = {rank: link for rank, link in slow.items() if nodes[rank] == node}
        own_links = [link for link in bad_links if node in (nodes[link.pair[0]], nodes[link.pair[1]])]
        suspects = [*own_slow.values(), *own_links]
        if suspects:
            told = [f"rank {rank}: at best {link.gb_per_s:.3g} GB/s" for rank, link in own_slow.items()]
            told += [
                f"ranks {link.pair[0]} and {link.pair[1]}: {link.gb_per_s:.3g} GB/s" for link in own_links
            ]
            references = {_kind(link, nodes) for link in suspects}
            findings[node] = Finding(
                check=check,
                verdict=max(bar.verdict(link.gb_per_s, middle[_kind(link, nodes)]) for link in suspects),
                found=", ".join(told),
                rule=f"the median is {_references(middle, references)}",
                remedy="check card, cable and switch port of the rank; drain the node",
            )
        else:
            findings[node] = passed(check, f"median {_references(middle, middle)}")
    return findings


def _references(
    middle: Mapping[tuple[Exchange, bool], float], kinds: Collection[tuple[Exchange, bool]]
) -> str:
    return ", ".join(
        f"{rate:.3g} GB/s {'within a node' if within else 'between nodes'}"
        for (exchange, within), rate in middle.items()
        if (exchange, within) in kinds
    )
