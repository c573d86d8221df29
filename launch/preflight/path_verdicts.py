"""Verdicts on the MTU between nodes: who explains the packets that did not arrive."""

from collections.abc import Callable, Collection, Mapping, Sequence

from launch.preflight.findings import Finding, failed, passed, skipped, warned
from launch.preflight.hcas import name_cards
from launch.preflight.path_mtu import PathTry
from launch.preflight.reach import Refusal, culprits

PATH_MTU = "MTU between nodes"

Tries = Mapping[str, Sequence[PathTry]]
"""Node -> what it tried."""


def judge_path_mtu(
    tries: Tries, names: Mapping[int, str], nodes: Collection[str], absent: str
) -> dict[str, Finding]:
    """Node -> finding on the paths to and from it.

    Args:
        tries: node -> what it tried; without nodes that tried nothing.
        names: node leader -> name of its node.
        nodes: names of all nodes.
        absent: why a node without tries has none.
    """
    everything = [one for own in tries.values() for one in own]
    if everything and not any(one.arrived_bytes for one in everything):
        reason = next((one.reason for one in everything if one.reason), "UDP is filtered, or not routed")
        return {node: skipped(PATH_MTU, f"no packet of any size was answered: {reason}") for node in nodes}
    # Whom to blame, rail by rail: for large packets that did not arrive, and for any packet.
    cut = _blamed(tries, names, lambda one: 0 < one.arrived_bytes < one.wanted_bytes)
    mute = _blamed(tries, names, lambda one: not one.arrived_bytes)
    num_rails = len({one.card for one in everything})
    findings = {}
    for node in nodes:
        if node in cut:
            findings[node] = _judge_cut(name_cards(cut[node], num_rails), node, tries, names)
        elif node in mute:
            found = f"no packet of any size is answered over {name_cards(mute[node], num_rails)}"
            rule = "each rail must reach the same rail of other nodes"
            remedy = "check routes of the cards' addresses (ip route, ip rule), cables, and firewalls"
            findings[node] = warned(PATH_MTU, found, rule, remedy)
        elif own := tries.get(node):
            sizes = " and ".join(str(size) for size in sorted({one.wanted_bytes for one in own}))
            rails, targets = len({one.card for one in own}), len({one.target for one in own})
            rest = ", except from and to nodes that fail" if cut or mute else ""
            findings[node] = passed(PATH_MTU, f"{sizes} bytes over {rails} rails to {targets} nodes{rest}")
        else:
            findings[node] = skipped(PATH_MTU, absent)
    return findings


def _judge_cut(cards: str, node: str, tries: Tries, names: Mapping[int, str]) -> Finding:
    lost = [
        one
        for source, own in tries.items()
        for one in own
        if node in (source, names[one.target]) and 0 < one.arrived_bytes < one.wanted_bytes
    ]
    wanted, arrived = max(one.wanted_bytes for one in lost), min(one.arrived_bytes for one in lost)
    found = f"over {cards}, packets of {wanted} bytes do not arrive; those of {arrived} do"
    rule = "packets of the cards' MTU must arrive over every rail: otherwise connections are made, and hang"
    remedy = f"set the MTU of these cards' switch ports, and of those between switches, to {wanted} or more"
    return failed(PATH_MTU, found, rule, remedy)


def _blamed(
    tries: Tries, names: Mapping[int, str], is_bad: Callable[[PathTry], bool]
) -> dict[str, list[str]]:
    """Node -> cards on whose rail it explains bad tries."""
    refusals: dict[str, list[Refusal]] = {}
    for node, own in tries.items():
        for one in own:
            if is_bad(one):
                refusal = Refusal(source=node, target=names[one.target], reason=one.reason)
                refusals.setdefault(one.card, []).append(refusal)
    blamed: dict[str, list[str]] = {}
    for card, of_rail in refusals.items():
        for node in culprits(of_rail):
            blamed.setdefault(node, []).append(card)
    return blamed
