"""Which nodes others can reach, tried before all connect at once, where one that cannot looks like all.

Libraries listen on free ports of the address that is tried here. So a firewall that closes those, an address
that only the node itself can use, or a wrong interface is found with the name of its node.
"""

import contextlib
import os
import socket
from collections import Counter
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass

from launch.preflight.findings import Finding, failed, passed, skipped
from launch.rendezvous import RendezvousError, address_of

REACH = "reachable"
CONNECT_S = 5.0
"""Longest that a connection may take."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Refusal:
    """A connection between two nodes that failed."""

    source: str
    target: str
    reason: str


def neighbours(node: int, num_nodes: int) -> list[int]:
    """Numbers of the nodes that a node tries: the next two and the opposite one; each is tried by as many."""
    return sorted({(node + step) % num_nodes for step in (1, 2, num_nodes // 2)} - {node})


@contextlib.contextmanager
def listening(interface: str | None) -> Iterator[str]:
    """A place of this node where others can try to connect, as `ADDRESS PORT`; the reason if there is none.

    `interface` is `cluster.fabric.interface`; without it, gloo's variable or the host's name counts.
    """
    with socket.socket(socket.AF_INET, socket.SOCK_STREAM) as listener:
        try:
            address = socket.gethostbyname(address_of(interface or os.environ.get("GLOO_SOCKET_IFNAME")))
            listener.bind((address, 0))
            listener.listen()
            place = " ".join(map(str, listener.getsockname()))
        except (OSError, RendezvousError) as error:
            place = f"it listens nowhere: {error}"
        yield place


def try_to_reach(place: str) -> str | None:
    """Connect to a place that `listening` gave; why that failed, or None."""
    address, _, port = place.partition(" ")
    if not port.isdigit():
        return place
    try:
        with socket.create_connection((address, int(port)), timeout=CONNECT_S):
            return None
    except OSError as error:
        return f"{address}:{port}: {error}"


def judge_reach(refusals: Collection[Refusal], nodes: Collection[str]) -> dict[str, Finding]:
    """Node -> finding; `nodes` are all."""
    guilty = culprits(refusals)
    findings = {}
    for node in nodes:
        own = [refusal for refusal in refusals if node in (refusal.source, refusal.target)]
        if len(nodes) == 1:
            findings[node] = skipped(REACH, "there is no other node")
        elif node in guilty:
            told = [f"{one.source} to {one.target}: {one.reason}" for one in own]
            rule = "nodes must take TCP connections of each other, on every free port"
            remedy = "open the firewall, mend its name in /etc/hosts or cluster.fabric.interface, or drain it"
            findings[node] = failed(REACH, "; ".join(told[:3]), rule, remedy)
        else:
            findings[node] = passed(
                REACH, "by the nodes that tried, but for those that fail" if own else "yes"
            )
    return findings


def culprits(refusals: Collection[Refusal]) -> set[str]:
    """The nodes that explain all refusals: again and again the end of most; of as many, all. Where three fail
    that tried each other, one that they tried may be among them."""
    left, found = list(refusals), set[str]()
    while left:
        counts = Counter(node for one in left for node in (one.source, one.target))
        worst = {node for node, count in counts.items() if count == max(counts.values())}
        found |= worst
        left = [one for one in left if not {one.source, one.target} & worst]
    return found


def refusals_of(refused: Mapping[int, Mapping[int, str]], names: Mapping[int, str]) -> list[Refusal]:
    """Of what ranks told: rank -> rank that it could not reach -> reason; `names` has the node of each."""
    return [
        Refusal(source=names[source], target=names[target], reason=reason)
        for source, own in refused.items()
        for target, reason in own.items()
    ]
