"""Rails: which switch each card is plugged into, as lldpd hears it, and whether that is so on all nodes.

In a rail-optimized fabric, the same card of all nodes of a unit is on one leaf switch, so what ranks send to
the same card of other nodes crosses one switch. Two exchanged cables send it through the spine.
"""

import json
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from launch.preflight.findings import Finding, passed, skipped, warned
from launch.preflight.hcas import Hca, name_cards
from launch.preflight.system import AbsentError, BrokenError, Missing, System

RAILS = "rails"
FORMATS = ("json0", "json")
"""Formats of lldpctl, the regular one first; lldpd before 0.9.9 has only the other."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Neighbour:
    """What a card is plugged into."""

    switch: str
    """Name of the switch, or its identifier if it says none; several if the card has several ports."""
    port: str


Neighbours = dict[str, Neighbour]
"""Card -> its neighbour; cards whose switch sends nothing are left out."""


def read_neighbours(system: System, hcas: Sequence[Hca]) -> Neighbours:
    """Neighbours of the cards.

    Raises:
        AbsentError: lldpctl is not installed.
        BrokenError: lldpd does not run, or lldpctl prints something unexpected.
    """
    try:
        text = system.run(["lldpctl", "-f", FORMATS[0]])
    except AbsentError as error:
        raise AbsentError("lldpctl is not installed: install lldpd on the nodes") from error
    except BrokenError:
        text = system.run(["lldpctl", "-f", FORMATS[1]])
    by_interface = parse_lldpctl(text)
    found = {}
    for hca in hcas:
        own = [by_interface[name] for name in hca.interfaces if name in by_interface]
        if own:
            switches = "+".join(sorted({one.switch for one in own}))
            found[hca.name] = Neighbour(switch=switches, port="+".join(one.port for one in own))
    return found


def parse_lldpctl(text: str) -> Neighbours:
    """Interface -> neighbour, from any of lldpctl's JSON formats. Raises `BrokenError` for other texts.

    In `json0`, everything is a list. In `json`, interfaces and switches are keys, and lists of one are not
    lists.
    """
    try:
        interfaces = _only(json.loads(text)["lldp"]).get("interface", [])
        if isinstance(interfaces, dict):
            interfaces = [{name: own} for name, own in interfaces.items()]
        found = {}
        for entry in interfaces:
            name, own = (entry["name"], entry) if "name" in entry else next(iter(entry.items()))
            found[name] = Neighbour(switch=_switch(own["chassis"]), port=_value(_only(own["port"])["id"]))
    except (ValueError, KeyError, TypeError, AttributeError, IndexError) as error:
        raise BrokenError("lldpctl printed no neighbours in a known format") from error
    return found


def judge_rails(by_node: Mapping[str, Neighbours | Missing], hcas: Sequence[str]) -> dict[str, Finding]:
    """Node -> finding: is each card on the switch that it is on at the nodes which share its switches?

    Args:
        by_node: node -> neighbours of its cards.
        hcas: names of all cards that training uses.
    """
    # 1. Nodes with the same switches are peers, and so are those with half of the same, cables aside.
    plugged = {node: own for node, own in by_node.items() if not isinstance(own, Missing)}
    switches = {node: frozenset(one.switch for one in own.values()) for node, own in plugged.items()}
    units = Counter(switches.values())
    where: dict[frozenset[str], Counter[tuple[str, str]]] = {unit: Counter() for unit in units}
    for node, own in plugged.items():
        where[switches[node]].update((card, one.switch) for card, one in own.items())
    findings = {}
    for node, own_or_missing in by_node.items():
        if isinstance(own_or_missing, Missing):
            findings[node] = skipped(RAILS, own_or_missing.reason)
            continue
        unit = switches[node]
        peers = [other for other in units if unit and 2 * len(unit & other) >= len(unit)]
        counts = sum((where[other] for other in peers), Counter[tuple[str, str]]())
        num_others = sum(units[other] for other in peers) - 1
        findings[node] = _judge_node(own_or_missing, hcas, counts, num_others)
    return findings


def _judge_node(
    own: Neighbours, hcas: Sequence[str], counts: Counter[tuple[str, str]], num_others: int
) -> Finding:
    """`counts` are (card, switch) of all peers, this node included, of which there are `num_others`."""
    if not own:
        return skipped(RAILS, "lldpd hears no switch on any card: do they send LLDP?")
    if not num_others:
        return skipped(RAILS, "no other node shares its switches, or none answers: nothing to compare with")
    odd = []
    for card, one in own.items():
        others = Counter({switch: n for (name, switch), n in counts.items() if name == card})
        others[one.switch] -= 1
        usual, count = others.most_common(1)[0]
        if usual != one.switch and 2 * count > num_others:
            odd.append(f"{card} is on {one.switch} port {one.port}, that of other nodes on {usual}")
    if odd:
        rule = "a card must be on the switch of its rail, otherwise its traffic goes through the spine"
        return warned(RAILS, "; ".join(odd), rule, "exchange the cables, or correct the order of the cards")
    silent = [card for card in hcas if card not in own]
    if silent:
        return skipped(
            RAILS, f"lldpd hears no switch on {name_cards(silent, len(hcas))}; the others are right"
        )
    num_switches = len({one.switch for one in own.values()})
    return passed(RAILS, f"{len(own)} cards on {num_switches} switches, as on {num_others} other nodes")


def _only(value: Any) -> Any:
    return value[0] if isinstance(value, list) else value


def _value(value: Any) -> str:
    text = _only(value)["value"]
    if not isinstance(text, str):
        raise TypeError(f"{text!r} is no text")
    return text


def _switch(chassis: Any) -> str:
    own = _only(chassis)
    # In `json` the name is the key, unless the switch says none.
    if isinstance(chassis, dict) and "id" not in own:
        return str(next(iter(own)))
    return _value(own["name"] if "name" in own else own["id"])
