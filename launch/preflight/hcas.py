"""RDMA network cards (host channel adapters) as shown by the kernel, and checks of them."""

import re
from collections.abc import Sequence
from dataclasses import dataclass

from k25_train.config.cluster import DETECT, FabricConfig
from launch.preflight.findings import Finding, failed, passed, warned
from launch.preflight.system import System

FOLDER = "sys/class/infiniband"
NET = "sys/class/net"
ROCE_V2 = "RoCE v2"
MIN_MTU_BYTES = 4200
"""Smallest MTU that fits RDMA packets of 4096 bytes, the largest, with their headers. Below it, the card
falls back to 2048 or 1024 bytes per packet."""

CARDS, SPEED, MTU, GID = HCA_CHECKS = ("network cards", "network speed", "network MTU", "RoCE v2 GID")


@dataclass(frozen=True, slots=True, kw_only=True)
class Gid:
    """An address of a port, which is a row of its GID table."""

    index: int
    address: str
    kind: str
    """`RoCE v2`, `IB/RoCE v1` or another type as named by the kernel."""
    interface: str
    """Network interface that has the address; empty on InfiniBand."""

    @property
    def is_routable_v2(self) -> bool:
        """Whether it is RoCE v2 with a routable address, which a link-local one is not."""
        return self.kind == ROCE_V2 and not self.address.startswith("fe80:")

    @property
    def ipv4(self) -> str:
        """The IPv4 address that is mapped to it; empty for an IPv6 address."""
        if not self.address.startswith("0000:0000:0000:0000:0000:ffff:"):
            return ""
        digits = self.address.replace(":", "")[-8:]
        return ".".join(str(int(digits[at : at + 2], 16)) for at in range(0, 8, 2))


@dataclass(frozen=True, slots=True, kw_only=True)
class Hca:
    """Port 1 of a card; None for values that the kernel does not show."""

    name: str
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
    def routable_gids(self) -> list[Gid]:
        """Rows that a RoCE v2 fabric can use, by index."""
        return [gid for gid in self.gids if gid.is_routable_v2]


def read_hcas(system: System) -> list[Hca]:
    """Every card of the node, used by training or not."""
    return [_read_hca(system, name) for name in system.names(FOLDER)]


def judge_hcas(hcas: Sequence[Hca], fabric: FabricConfig, node_gb_per_s: float) -> list[Finding]:
    """Check state, speed, MTU and addresses of the cards that the cluster file names.

    `node_gb_per_s` is the rate that the plan assumes for a node. If cards are missing, that is the only
    finding.
    """
    in_use = [hca for hca in hcas if hca.name in fabric.hcas]
    missing = sorted(set(fabric.hcas) - {hca.name for hca in in_use})
    if missing:
        present = ", ".join(hca.name for hca in hcas) or "none"
        remedy = f"the node has {present}; correct cluster.fabric.hcas, or load the driver and drain the node"
        rule = "each card of the cluster file must exist"
        return [failed(CARDS, f"no {', '.join(missing)}", rule, remedy)]
    findings = [_judge_state(in_use), _judge_rate(in_use, node_gb_per_s)]
    on_ethernet = [hca for hca in in_use if hca.link_layer == "Ethernet"]
    if on_ethernet:
        findings += [_judge_mtu(on_ethernet), _judge_gids(on_ethernet, fabric.gid_index)]
    return findings


def _read_hca(system: System, name: str) -> Hca:
    card = f"{FOLDER}/{name}"
    port = f"{card}/ports/1"

    def value(path: str) -> str:
        return system.read(path) or ""

    # 1. Interfaces. A card that is split for virtual machines also has one for each of their ports (pf0vf1).
    names = (
        name
        for name in system.names(f"{card}/device/net")
        if not re.search(r"pf\d", value(f"{NET}/{name}/phys_port_name"))
    )
    # 2. Forced traffic class. Rules for single addresses may follow it; they start with the address.
    forced = re.match(r"Global tclass=(\d+)", value(f"{card}/tc/1/traffic_class"))
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
        name=name,
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


def _judge_mtu(hcas: Sequence[Hca]) -> Finding:
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
    if min(sizes) < MIN_MTU_BYTES:
        rule = f"RDMA packets of 4096 bytes need {MIN_MTU_BYTES}"
        return warned(check, found, rule, "ip link set INTERFACE mtu 9000, on switches too")
    return passed(check, found)


def _judge_gids(hcas: Sequence[Hca], gid_index: int | str) -> Finding:
    check = GID
    detects = gid_index == DETECT
    # NCCL searches for rows with an IPv4 address; a fixed index may refer to any row.
    usable = {hca.name: [gid for gid in hca.routable_gids if gid.ipv4 or not detects] for hca in hcas}
    without = [name for name, gids in usable.items() if not gids]
    if without:
        rule = f"RoCE v2 needs a GID with an {'IPv4 address' if detects else 'routable address'}"
        remedy = "give the interface an IPv4 address and bring it up; drain the node"
        return failed(check, f"none on {', '.join(without)}", rule, remedy)
    found = ", ".join(
        f"{name}: {gids[0].index} ({gids[0].ipv4 or gids[0].address})" for name, gids in usable.items()
    )
    if detects:
        return passed(check, found)
    wrong = [name for name, gids in usable.items() if gid_index not in [gid.index for gid in gids]]
    if wrong:
        rule = f"cluster.fabric.gid_index is {gid_index}, which is not usable on {', '.join(wrong)}"
        return failed(check, found, rule, "correct it, or let NCCL find it: cluster.fabric.gid_index=detect")
    return passed(check, f"{gid_index} on all cards")
