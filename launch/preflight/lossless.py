"""Checks for packet loss: the priority that pauses instead of dropping, and the cards' counters.

RoCE needs one priority with priority flow control (PFC), where a full receiver pauses its sender. A packet's
traffic class selects the priority: its upper six bits are the DSCP, which the card maps to a priority.
"""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from launch.preflight.findings import Finding, failed, passed, skipped, warned
from launch.preflight.hcas import FOLDER, Hca
from launch.preflight.system import AbsentError, BrokenError, System

LOST = re.compile(
    r"packet_seq_err|implied_nak_seq_err|local_ack_timeout_err|rnr_nak_retry_err"
    r"|port_rcv_errors|link_downed|symbol_error"
    r"|(rx|tx)_(prio\d_)?discards(_phy)?|rx_prio\d_(buf|cong)_discard"
    r"|rx_crc_errors_phy|rx_symbol_err_phy|link_down_events_phy"
)
"""Counters that grow when packets or links are lost: RDMA's in sysfs, Ethernet's from ethtool."""
MANY_LOST = 100
"""Number of lost packets from which a node fails: a few may be another user's of the card. Our choice."""
PAUSES = re.compile(r"(rx|tx)_prio(\d)_pause")
"""Counters of pause frames by priority."""

TRAFFIC_CLASS = "traffic class"
COUNTERS = "PFC and loss counters"


Counters = dict[str, dict[str, int]]
"""Card -> name of a counter -> its count."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Priorities:
    """How the card of an interface maps packets to its eight priorities."""

    trust: str
    """What determines the priority: `dscp`, or `pcp` for the VLAN tag."""
    by_dscp: Mapping[int, int]
    """DSCP -> priority."""
    lossless: tuple[int, ...]
    """Priorities with flow control."""


def read_priorities(system: System, interface: str) -> Priorities:
    """Settings of an interface, from mlnx_qos.

    Raises:
        AbsentError: mlnx_qos is not installed.
        BrokenError: mlnx_qos fails or prints something unexpected.
    """
    text = system.run(["mlnx_qos", "-i", interface])
    trust = re.search(r"Priority trust state:\s*(\w+)", text)
    enabled = re.search(
        r"PFC configuration:.*?^\s*enabled((?:\s+[01]){8})\s*$", text, re.DOTALL | re.MULTILINE
    )
    # The trust state is "none" if mlnx_qos could not query the card, e.g. for a virtual function.
    if trust is None or trust[1] == "none" or enabled is None:
        raise BrokenError(f"mlnx_qos -i {interface}: no trust state or PFC configuration in its output")
    mapped = re.findall(r"prio:(\d)\s+dscp:([\d,]+)", text)
    return Priorities(
        trust=trust[1],
        by_dscp={
            int(dscp): int(priority) for priority, listed in mapped for dscp in re.findall(r"\d+", listed)
        },
        lossless=tuple(priority for priority, flag in enumerate(enabled[1].split()) if flag == "1"),
    )


def read_counters(system: System, hca: Hca) -> dict[str, int]:
    """Counters of lost packets, broken links and pauses: name -> count since the driver was loaded.

    Counters of the Ethernet port are missing if ethtool is not installed or fails, as it does for an
    interface without counters (macvlan in a container).
    """
    # RDMA's counters of the port.
    port = f"{FOLDER}/{hca.card.device}/ports/{hca.card.port}"
    counts = {
        name: int(text)
        for folder in (f"{port}/counters", f"{port}/hw_counters")
        for name in system.names(folder)
        if (text := system.read(f"{folder}/{name}") or "").isdigit()
    }
    # Ethernet's counters, added up over bonded ports.
    for interface in hca.interfaces:
        try:
            printed = system.run(["ethtool", "-S", interface])
        except (AbsentError, BrokenError):
            continue
        for name, count in re.findall(r"^\s+(\w+): (\d+)$", printed, re.MULTILINE):
            counts[name] = counts.get(name, 0) + int(count)
    return {name: count for name, count in counts.items() if LOST.fullmatch(name) or PAUSES.fullmatch(name)}


def judge_traffic_class(
    hcas: Sequence[Hca], priorities: Mapping[str, Priorities | str], traffic_class: int
) -> list[Finding]:
    """Check that packets of the traffic class are on a lossless priority.

    `priorities` maps each card, or port of a bonded card, to its settings or to why they are unknown.
    """
    check = TRAFFIC_CLASS
    # 1. Does the driver override the traffic class?
    forced = {hca.name: hca.traffic_class for hca in hcas if hca.traffic_class not in (None, traffic_class)}
    if forced:
        rule = f"cluster.fabric.traffic_class is {traffic_class}, and the driver's value wins"
        remedy = f"write tclass={traffic_class} into /sys/class/infiniband/CARD/tc/PORT/traffic_class"
        return [failed(check, f"the driver forces {forced}", rule, remedy)]
    # 2. Is its DSCP mapped to a lossless priority on every card?
    dscp = traffic_class >> 2
    findings = []
    for name, known in priorities.items():
        if isinstance(known, str):
            return [skipped(check, known)]
        priority = known.by_dscp.get(dscp)
        rule = f"traffic class {traffic_class} is DSCP {dscp}, whose priority must be lossless"
        if known.trust != "dscp":
            found = f"{name} takes the priority from {known.trust}"
            findings.append(failed(check, found, rule, "mlnx_qos -i INTERFACE --trust dscp"))
        elif priority not in known.lossless:
            found = f"{name} puts it on priority {priority}, flow control is on {list(known.lossless)}"
            remedy = (
                "mlnx_qos -i INTERFACE --pfc ..., on switches too, or correct cluster.fabric.traffic_class"
            )
            findings.append(failed(check, found, rule, remedy))
    if findings:
        return findings
    used = sorted({known.by_dscp[dscp] for known in priorities.values() if not isinstance(known, str)})
    return [
        passed(check, f"{traffic_class} is DSCP {dscp}, on lossless priority {', '.join(map(str, used))}")
    ]


def judge_growth(before: Mapping[str, Mapping[str, int]], after: Mapping[str, Mapping[str, int]]) -> Finding:
    """Compare the cards' counters (card -> name -> count) before and after the fabric was measured."""
    check = COUNTERS
    if not any(before.values()):
        return skipped(check, "the cards show no counters")
    grown = {
        (card, name): count - before[card][name]
        for card, counts in after.items()
        for name, count in counts.items()
        if count > before.get(card, {}).get(name, count)
    }
    # Loss fails or warns, pauses are normal.
    lost = [f"{card} {name} +{count}" for (card, name), count in grown.items() if LOST.fullmatch(name)]
    if lost:
        rule = "no packet may be lost: RDMA retransmits the whole message"
        remedy = "check PFC on switch and card, cables, and the switch port's counters"
        num_lost = sum(count for (_, name), count in grown.items() if LOST.fullmatch(name))
        flapped = any("link" in name for _, name in grown)
        judged = failed if flapped or num_lost >= MANY_LOST else warned
        return judged(check, ", ".join(lost), rule, remedy)
    pauses = sum(count for (_, name), count in grown.items() if PAUSES.fullmatch(name))
    return passed(check, f"no loss, {pauses} pause frames while measuring")
