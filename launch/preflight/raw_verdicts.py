"""Verdicts on the cards' raw rates: which card of which node is slow, or which connection of sound ones."""

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field

from launch.preflight.findings import Finding, failed, passed, skipped, warned
from launch.preflight.hcas import name_cards
from launch.preflight.perftest import RawLink
from launch.preflight.system import Missing

RAW = "raw RDMA rates"
GOOD_SHARE, LEAST_SHARE = 0.9, 0.5
"""Shares of a card's speed: sound ones reach 97% with jumbo packets; below the second, a node fails. Our
choice."""


@dataclass(slots=True)
class _Own:
    """Connections of one node."""

    best: dict[str, RawLink] = field(default_factory=dict)
    """Card -> its better connection: the other one's partner may be the slow one."""
    links: list[RawLink] = field(default_factory=list)
    broken: dict[str, str] = field(default_factory=dict)
    """Card -> why a connection has no rate."""

    def add(self, link: RawLink) -> None:
        if isinstance(link.gbps, Missing):
            self.broken[link.card] = link.gbps.reason
            return
        self.links.append(link)
        if link.card not in self.best or _share(link) > _share(self.best[link.card]):
            self.best[link.card] = link


def judge_raw(
    links: Sequence[RawLink], names: Mapping[int, str], nodes: Collection[str], absent: Mapping[str, str]
) -> dict[str, Finding]:
    """Node -> finding on its cards.

    Args:
        links: everything that was measured.
        names: node leader -> name of its node.
        nodes: names of all nodes.
        absent: node -> why it measured nothing.
    """
    by_node = {node: _Own() for node in nodes}
    for link in links:
        for leader in link.pair:
            by_node[names[leader]].add(link)
    slow = {
        (node, card) for node, own in by_node.items() for card, link in own.best.items() if _is_slow(link)
    }
    findings = {}
    for node, own in by_node.items():
        between_sound = [
            link
            for link in own.links
            if _is_slow(link) and not any((names[leader], link.card) in slow for leader in link.pair)
        ]
        own_slow = [link for card, link in own.best.items() if (node, card) in slow]
        if own_slow or between_sound:
            findings[node] = _judge_slow(own_slow, between_sound, names)
        elif own.broken:
            num_cards = len(own.broken.keys() | own.best.keys())
            reason = next(iter(own.broken.values()))
            found = f"no rate of {name_cards(list(own.broken), num_cards)}: {reason}"
            findings[node] = skipped(RAW, found)
        elif own.best:
            rates = sorted(_gbps(link) for link in own.best.values())
            findings[node] = passed(RAW, f"{len(rates)} cards, {rates[0]:.0f} to {rates[-1]:.0f} Gb/s")
        else:
            findings[node] = skipped(RAW, absent.get(node, "no other node of its pairs has it"))
    return findings


def _judge_slow(
    slow: Sequence[RawLink], between_sound: Sequence[RawLink], names: Mapping[int, str]
) -> Finding:
    rule = f"ib_write_bw should reach {GOOD_SHARE:.0%} of the cards' speed"
    if slow:
        found = ", ".join(f"{link.card}: {_gbps(link):.0f} of {link.rate_gbps:g} Gb/s" for link in slow)
        remedy = "check PCIe, cable and switch port of these cards; drain the node"
        judged = failed if min(map(_share, slow)) < LEAST_SHARE else warned
        return judged(RAW, found, f"{rule} with one of two other nodes", remedy)
    found = ", ".join(
        f"{link.card} between {' and '.join(names[leader] for leader in link.pair)}: {_gbps(link):.0f} Gb/s"
        for link in between_sound
    )
    return warned(RAW, found, rule, "check what is between the switches of these cards")


def _gbps(link: RawLink) -> float:
    return 0.0 if isinstance(link.gbps, Missing) else link.gbps


def _share(link: RawLink) -> float:
    return _gbps(link) / link.rate_gbps


def _is_slow(link: RawLink) -> bool:
    return _share(link) < GOOD_SHARE
