"""Which nodes can be reached; tried before all ranks connect at once.

Then, one unreachable node looks like many. Libraries listen on free ports of the address that is tried here.
A firewall that blocks them, an address that is only valid on the node itself, or a wrong interface is thus
found together with the name of the node.
"""

import contextlib
import os
import socket
from collections import Counter
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass

from k25_train.joining.network import endpoint as endpoint_of
from launch.preflight.findings import Finding, failed, passed, skipped
from launch.rendezvous import IPV4, IPV6, RendezvousError, address_of

REACH = "reachable"
CONNECT_S = 5.0
"""Time limit of a connection attempt."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Refusal:
    """A failed connection attempt between two nodes."""

    source: str
    target: str
    reason: str


def neighbours(node: int, num_nodes: int) -> list[int]:
    """Nodes that a node tries: the next two and the opposite one; every node is tried equally often."""
    return sorted({(node + step) % num_nodes for step in (1, 2, num_nodes // 2)} - {node})


@contextlib.contextmanager
def listening(interface: str | None, family: str = IPV4) -> Iterator[str]:
    """Listen on this node, and give others the endpoint `ADDRESS PORT`, or the reason if that fails.

    `interface` is the first of `cluster.fabric.interface`; if None, gloo's variable or the host's name
    determines the address. `family` is `cluster.fabric.address_family`.
    """
    version = socket.AF_INET6 if family == IPV6 else socket.AF_INET
    with socket.socket(version, socket.SOCK_STREAM) as listener:
        try:
            name = interface or os.environ.get("GLOO_SOCKET_IFNAME", "").partition(",")[0] or None
            found = socket.getaddrinfo(address_of(name, family), 0, version, socket.SOCK_STREAM)
            listener.bind(found[0][4])
            listener.listen()
            endpoint = " ".join(map(str, listener.getsockname()[:2]))
        except (OSError, RendezvousError) as error:
            endpoint = f"it cannot listen: {error}"
        yield endpoint


def try_to_reach(endpoint: str) -> str | None:
    """Connect to an endpoint from `listening`; returns why that failed, or None."""
    address, _, port = endpoint.partition(" ")
    if not port.isdigit():
        return endpoint
    try:
        with socket.create_connection((address, int(port)), timeout=CONNECT_S):
            return None
    except OSError as error:
        return f"{endpoint_of(address, int(port))}: {error}"


def judge_reach(
    refusals: Collection[Refusal], nodes: Collection[str], tried: Collection[str]
) -> dict[str, Finding]:
    """Node -> finding on its reachability; `nodes` are all nodes, `tried` those that tried others
    and were tried."""
    guilty = culprits(refusals)
    findings = {}
    for node in nodes:
        own = [refusal for refusal in refusals if node in (refusal.source, refusal.target)]
        if len(nodes) == 1:
            findings[node] = skipped(REACH, "there is no other node")
        elif node in guilty:
            texts = [f"{one.source} to {one.target}: {one.reason}" for one in own]
            rule = "nodes must accept TCP connections from each other on every free port"
            remedy = "open the firewall, fix its name in /etc/hosts or cluster.fabric.interface, or drain it"
            findings[node] = failed(REACH, "; ".join(texts[:3]), rule, remedy)
        elif node not in tried:
            findings[node] = skipped(REACH, "broken off before nodes tried each other")
        else:
            findings[node] = passed(
                REACH, "by the nodes that tried, except those that fail" if own else "yes"
            )
    return findings


def culprits(refusals: Collection[Refusal]) -> set[str]:
    """The nodes that explain all refusals: repeatedly the one with most of the unexplained ones, or all of
    them if several have as many. If three nodes fail that tried each other, a sound node that they tried may
    be among them."""
    unexplained, found = list(refusals), set[str]()
    while unexplained:
        counts = Counter(node for one in unexplained for node in (one.source, one.target))
        worst = {node for node, count in counts.items() if count == max(counts.values())}
        found |= worst
        unexplained = [one for one in unexplained if not {one.source, one.target} & worst]
    return found


def refusals_of(refused: Mapping[int, Mapping[int, str]], names: Mapping[int, str]) -> list[Refusal]:
    """Refusals by node, from rank -> rank that it could not reach -> reason; `names` maps ranks to nodes."""
    return [
        Refusal(source=names[source], target=names[target], reason=reason)
        for source, own in refused.items()
        for target, reason in own.items()
    ]
