"""RDMA network cards (host channel adapters) as shown by the kernel, and checks of them."""

import re
from collections.abc import Collection, Sequence
from dataclasses import dataclass

from k25_train.config.fabric import Card, FabricConfig
from launch.preflight.findings import Finding, failed, passed, skipped, warned
from launch.preflight.gids import GID, Gid, judge_gids
from launch.preflight.system import System

FOLDER = "sys/class/infiniband"
NET = "sys/class/net"
MIN_MTU_BYTES = 4200
"""Smallest MTU that fits RDMA packets of 4096 bytes, the largest, with their headers. Below it, the card
falls back to 2048 or 1024 bytes per packet."""

CARDS, SPEED, MTU = "network cards", "network speed", "network MTU"
HCA_CHECKS = (CARDS, SPEED, MTU, GID)


@dataclass(frozen=True, slots=True, kw_only=True)
class Hca:
    """A port of a card; None for values that the kernel does not show."""

    card: Card
    link_layer: str
    """`Ethernet` (RoCE) or `InfiniBand`."""
    state: str
    """`ACTIVE` if the port can carry traffic."""
    rate_gbps: float | None
    """Rate of all ports of the card together."""
    firmware: str
    numa_node: int | None
    interfaces: tuple[str, ...]
    """Network interfaces of the ports: one, several if they are bonded into one card, or none."""
    mtu_bytes: int | None
    """MTU of the card's interfaces."""
    gids: tuple[Gid, ...]
    traffic_class: int | None
    """Traffic class that the driver forces on all connections; None if it forces none."""

    @property
    def name(self) -> str:
        """Name of the device, with the port if it is not the first."""
        return card_name(self.card)

    @property
    def routable_gids(self) -> list[Gid]:
        """Rows that a RoCE v2 fabric can use, by index."""
        return [gid for gid in self.gids if gid.is_routable_v2]


def card_name(card: Card) -> str:
    """Name of the device, with the port if it is not the first."""
    return card.device if card.port == 1 else f"{card.device}:{card.port}"


def read_hcas(system: System, used: Collection[Card] = ()) -> list[Hca]:
    """Every card of the node: those of its ports that training uses, or the first."""
    return [
        _read_hca(system, name, port)
        for name in system.names(FOLDER)
        for port in [port for port in _ports(system, name) if Card(name, port) in used] or [1]
    ]


def judge_hcas(hcas: Sequence[Hca], fabric: FabricConfig, node_gb_per_s: float) -> list[Finding]:
    """Check state, speed, MTU and addresses of the cards that the cluster file names.

    `node_gb_per_s` is the rate that the plan assumes for a node. If cards are missing, that is the only
    finding.
    """
    in_use = [hca for hca in hcas if hca.card in fabric.cards]
    read = [hca.card for hca in in_use]
    missing = [hca for hca, card in zip(fabric.hcas, fabric.cards, strict=True) if card not in read]
    if missing:
        present = ", ".join(hca.name for hca in hcas) or "none"
        remedy = f"the node has {present}; correct cluster.fabric.hcas, or load the driver and drain the node"
        rule = "each card of the cluster file must exist"
        finding = failed(CARDS, f"no {', '.join(missing)}", rule, remedy)
        return [
            finding,
            *(skipped(check, "not all cards of the cluster file exist") for check in HCA_CHECKS[1:]),
        ]
    findings = [_judge_state(in_use), _judge_rate(in_use, node_gb_per_s)]
    on_ethernet = [hca for hca in in_use if hca.link_layer == "Ethernet"]
    if on_ethernet:
        findings += [
            _judge_mtu(on_ethernet, fabric.mtu_bytes),
            judge_gids({hca.name: hca.routable_gids for hca in on_ethernet}, fabric),
        ]
    else:
        findings += [skipped(check, "the cards are on InfiniBand") for check in (MTU, GID)]
    return findings


def name_cards(names: Sequence[str], num_cards: int) -> str:
    """The cards' names; the number if they are all of several, so that nodes with one fault read the same."""
    return f"all {num_cards} cards" if len(names) == num_cards > 1 else ", ".join(names)


def _ports(system: System, name: str) -> list[int]:
    return [int(port) for port in system.names(f"{FOLDER}/{name}/ports") if port.isdigit()]


def _read_hca(system: System, name: str, number: int) -> Hca:
    card = f"{FOLDER}/{name}"
    port = f"{card}/ports/{number}"

    def value(path: str) -> str:
        return system.read(path) or ""

    # 1. Interfaces. A card that is split for virtual machines also has one for each of their ports (pf0vf1).
    names = (
        name
        for name in system.names(f"{card}/device/net")
        if not re.search(r"pf\d", value(f"{NET}/{name}/phys_port_name"))
    )
    # 2. Forced traffic class. Rules for single addresses may follow it; they start with the address.
    forced = re.match(r"Global tclass=(\d+)", value(f"{card}/tc/{number}/traffic_class"))
    # 3. The GID table; unused rows hold zeros.
    gids = [
        Gid(
            index=int(index),
            address=address,
            kind=value(f"{port}/gid_attrs/types/{index}"),
            interface=value(f"{port}/gid_attrs/ndevs/{index}"),
        )
        for index in system.names(f"{port}/gids")
        if (address := value(f"{port}/gids/{index}")).strip("0:")
    ]
    # A container may not see the card's interface, but one of its own on top of it, which has an address.
    own = (gid.interface for gid in gids if gid.is_routable_v2)
    interfaces = _interfaces(system, next(names, "") or next(own, ""))
    return Hca(
        card=Card(name, number),
        link_layer=value(f"{port}/link_layer"),
        state=value(f"{port}/state").partition(":")[2].strip(),
        rate_gbps=_rate_gbps(system, value(f"{port}/rate"), interfaces),
        firmware=value(f"{card}/fw_ver"),
        numa_node=_whole(value(f"{card}/device/numa_node")),
        interfaces=interfaces,
        mtu_bytes=_whole(value(f"{NET}/{interfaces[0]}/mtu")) if interfaces else None,
        gids=tuple(gids),
        traffic_class=int(forced[1]) if forced else None,
    )


def _interfaces(system: System, first: str) -> tuple[str, ...]:
    """`first` and the interfaces that the driver bonded with it into one card."""
    bonded = (system.read(f"{NET}/{first}/master/bonding/slaves") or "").split()
    # Ports bonded into one card have no RDMA device of their own; if only the interfaces are bonded, they do.
    others = [
        name for name in bonded if name != first and not system.names(f"{NET}/{name}/device/infiniband")
    ]
    return (first, *others) if first else ()


def _rate_gbps(system: System, text: str, interfaces: Sequence[str]) -> float | None:
    rate = re.match(r"([\d.]+) Gb/sec", text)
    if rate is None:
        return None
    if len(interfaces) > 1:
        mode = system.read(f"{NET}/{interfaces[0]}/master/bonding/mode") or ""
        speeds = [_whole(system.read(f"{NET}/{name}/speed") or "") or -1 for name in interfaces]
        # For a bonded card the kernel shows the rate of one port. A port that is down has speed -1, or none.
        if not mode.startswith("active-backup") and max(speeds) > 0:
            return sum(speed for speed in speeds if speed > 0) / 1000
    return float(rate[1])


def _whole(text: str) -> int | None:
    return int(text) if re.fullmatch(r"-?\d+", text) else None


def _judge_state(hcas: Sequence[Hca]) -> Finding:
    check = CARDS
    down = [f"{hca.name} is {hca.state or 'without a state'}" for hca in hcas if hca.state != "ACTIVE"]
    if down:
        return failed(
            check, ", ".join(down), "each must be ACTIVE", "check cable and switch port; drain the node"
        )
    return passed(check, f"{', '.join(hca.name for hca in hcas)} active")


def _judge_rate(hcas: Sequence[Hca], node_gb_per_s: float) -> Finding:
    check = SPEED
    unknown = [hca.name for hca in hcas if hca.rate_gbps is None]
    if unknown:
        return skipped(check, f"the driver shows no rate of {name_cards(unknown, len(hcas))}")
    rates = sorted({hca.rate_gbps for hca in hcas if hca.rate_gbps is not None})
    total_gb_per_s = sum(hca.rate_gbps or 0.0 for hca in hcas) / 8
    speeds = " and ".join(f"{rate:g}" for rate in rates)
    found = f"{len(hcas)} cards of {speeds} Gb/s, {total_gb_per_s:g} GB/s per node"
    if len(rates) != 1:
        slow = [hca.name for hca in hcas if hca.rate_gbps != max(rates, default=None)]
        remedy = f"check cable and switch port of {', '.join(slow)}; drain the node"
        return failed(check, found, "all cards must run at one speed", remedy)
    if total_gb_per_s < node_gb_per_s:
        rule = f"the plan needs {node_gb_per_s:g} GB/s: cluster.gpus_per_node x cluster.network_gb_per_s"
        return failed(
            check, found, rule, "check cluster.fabric.hcas and the links, or correct the cluster file"
        )
    return passed(check, found)


def _judge_mtu(hcas: Sequence[Hca], wanted_bytes: int | None) -> Finding:
    check = MTU
    by_card = {hca.name: hca.mtu_bytes for hca in hcas}
    sizes = {size for size in by_card.values() if size is not None}
    if None in by_card.values():
        silent = ", ".join(name for name, size in by_card.items() if size is None)
        rule = "each card needs a network interface, otherwise it has no address"
        return failed(
            check,
            f"unknown for {silent}",
            rule,
            "check the driver and whether the container sees the interfaces",
        )
    found = f"{' and '.join(str(size) for size in sorted(sizes))} bytes"
    if len(sizes) > 1:
        rule = "all cards must have the same MTU, otherwise large packets are dropped"
        return failed(check, found, rule, "ip link set INTERFACE mtu 9000")
    if min(sizes) < (wanted_bytes or 0):
        rule = f"cluster.fabric.mtu_bytes is {wanted_bytes}"
        remedy = f"ip link set INTERFACE mtu {wanted_bytes}, on switches too, or correct the cluster file"
        return failed(check, found, rule, remedy)
    if min(sizes) < MIN_MTU_BYTES:
        rule = f"RDMA packets of 4096 bytes need {MIN_MTU_BYTES}"
        return warned(check, found, rule, "ip link set INTERFACE mtu 9000, on switches too")
    return passed(check, found)
