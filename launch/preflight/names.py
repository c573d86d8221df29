"""Names of nodes: resolved alike everywhere, to different addresses, and back."""

import ipaddress
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass

from launch.preflight.findings import Finding, failed, passed, skipped, warned
from launch.preflight.system import System

NAMES = "name resolution"
REMEDY = "correct DNS or /etc/hosts, the same on all nodes (getent ahosts NAME)"


@dataclass(frozen=True, slots=True, kw_only=True)
class Names:
    """What a node resolves."""

    host: str
    """Its own name."""
    addresses: tuple[str, ...]
    """Of its own name, without those of loopback; empty if it does not resolve."""
    reverse: str | None
    """Name of its first address; None if there is none."""
    first: str
    """Name by which ranks find the first node (MASTER_ADDR); empty if it is an address."""
    first_addresses: tuple[str, ...]
    """Of that name."""


def read_names(system: System) -> Names:
    """Resolve this host's name and the first node's."""
    host = system.host()
    own = tuple(address for address in system.lookup(host) if not _is_loopback(address))
    first = system.environment.get("MASTER_ADDR", "")
    if _is_address(first) or first == "localhost":
        first = ""
    return Names(
        host=host,
        addresses=own,
        reverse=system.reverse(own[0]) if own else None,
        first=first,
        first_addresses=tuple(system.lookup(first)) if first else (),
    )


def judge_names(names: Mapping[str, Names]) -> dict[str, Finding]:
    """Node -> finding on what it resolves, compared with the other nodes."""
    if len(names) < 2:
        return {node: skipped(NAMES, "a single node has no other to resolve") for node in names}
    # The first node may know itself by other addresses: /etc/hosts, or all of its own from systemd.
    others = (own.first_addresses for own in names.values() if not _is_first(own) and own.first_addresses)
    usual = Counter(others).most_common(1)
    owners: dict[str, set[str]] = {}
    for own in names.values():
        for address in own.addresses[:1]:
            owners.setdefault(address, set()).add(own.host)
    return {node: _judge(own, usual[0][0] if usual else (), owners) for node, own in names.items()}


def _judge(own: Names, usual: tuple[str, ...], owners: Mapping[str, set[str]]) -> Finding:
    # 1. The name by which all ranks meet.
    # One address in common is enough: not all nodes have those of IPv6.
    is_same = not usual or not set(usual).isdisjoint(own.first_addresses)
    if own.first and not (own.first_addresses and (is_same or _is_first(own))):
        found = f"{own.first} is {', '.join(own.first_addresses) or 'unknown'}"
        rule = f"on most nodes it is {', '.join(usual)}" if usual else "it must resolve: ranks meet there"
        return failed(NAMES, found, rule, REMEDY)
    if not own.addresses:
        return skipped(NAMES, f"{own.host} resolves to nothing but loopback")
    # 2. Its own name.
    sharers = sorted(owners[own.addresses[0]] - {own.host})
    if sharers:
        found = f"{own.host} is {own.addresses[0]}, and so is {', '.join(sharers[:3])}"
        return warned(NAMES, found, "each node must have an address of its own", REMEDY)
    if own.reverse is not None and _short(own.reverse) != _short(own.host):
        found = f"{own.host} is {own.addresses[0]}, which is {own.reverse}"
        return warned(NAMES, found, "a node's address must lead back to its name", REMEDY)
    back = "and back" if own.reverse is not None else "; its address has no name"
    return passed(NAMES, f"{own.host} to {own.addresses[0]} {back}".replace(" ;", ";"))


def _is_first(own: Names) -> bool:
    return bool(own.first) and _short(own.first) == _short(own.host)


def _short(name: str) -> str:
    return name.partition(".")[0].lower()


def _is_address(text: str) -> bool:
    try:
        ipaddress.ip_address(text.partition("%")[0])
    except ValueError:
        return False
    return True


def _is_loopback(text: str) -> bool:
    return _is_address(text) and ipaddress.ip_address(text.partition("%")[0]).is_loopback
