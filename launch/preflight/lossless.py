"""Whether the network loses packets: the priority that pauses instead of dropping, and the cards' counters.

RoCE needs one priority on which a full receiver pauses its sender (PFC). A packet's traffic class chooses the
priority: its upper six bits are the DSCP, which the card maps to a priority.
"""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from launch.preflight.findings import Finding, failed, passed, skipped, warned
from launch.preflight.hcas import FOLDER, Hca
from launch.preflight.machine import AbsentError, BrokenError, Machine

LOST = re.compile(
    r"packet_seq_err|implied_nak_seq_err|local_ack_timeout_err|rnr_nak_retry_err"
    r"|port_rcv_errors|link_downed|symbol_error"
    r"|(rx|tx)_(prio\d_)?discards(_phy)?|rx_prio\d_(buf|cong)_discard"
    r"|rx_crc_errors_phy|rx_symbol_err_phy|link_down_events_phy"
)
"""Counters that grow when packets get lost or a link breaks: RDMA's own in sysfs, Ethernet's from ethtool."""
MANY_LOST = 100
"""Lost packets from which on a node fails: a few may be another user's of the card. Our choice."""
PAUSES = re.compile(r"(rx|tx)_prio(\d)_pause")
"""Counters of pause frames by priority."""

TRAFFIC_CLASS = "traffic class"
COUNTERS = "PFC and loss counters"


@dataclass(frozen=True, slots=True, kw_only=True)
class Priorities:
    """How the card of an interface sorts packets into its eight priorities."""

    trust: str
    """What chooses the priority: `dscp` or `pcp`, the VLAN tag."""
    by_dscp: Mapping[int, int]
    """DSCP -> priority."""
    lossless: tuple[int, ...]
    """Priorities with flow control."""


def read_priorities(machine: Machine, interface: str) -> Priorities:
    """Settings of an interface, from mlnx_qos.

    Raises:
        AbsentError: the command is not installed.
        BrokenError: it fails or prints something else.
    """
    text = machine.run(["mlnx_qos", "-i", interface])
    trust = re.search(r"Priority trust state:\s*(\w+)", text)
    enabled = re.search(
        r"PFC configuration:.*?^\s*enabled((?:\s+[01]){8})\s*$", text, re.DOTALL | re.MULTILINE
    )
    # It writes "none" where it could not ask the card, as of a virtual function.
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


def read_counters(machine: Machine, hca: Hca) -> dict[str, int]:
    """Counters of lost packets, broken links and pauses: name -> count since the driver was loaded.

    Those of the Ethernet port are left out where ethtool is not there, or fails, as it does for an interface
    without any (macvlan in a container).
    """
    port = f"{FOLDER}/{hca.name}/ports/1"
    counts = {
        name: int(text)
        for folder in (f"{port}/counters", f"{port}/hw_counters")
        for name in machine.names(folder)
        if (text := machine.read(f"{folder}/{name}") or "").isdigit()
    }
    for interface in hca.interfaces:
        try:
            printed = machine.run(["ethtool", "-S", interface])
        except (AbsentError, BrokenError):
            continue
        for name, count in re.findall(r"^\s+(\w+): (\d+)$", printed, re.MULTILINE):
            counts[name] = counts.get(name, 0) + int(count)
    return {name: count for name, count in counts.items() if LOST.fullmatch(name) or PAUSES.fullmatch(name)}


def judge_traffic_class(
    hcas: Sequence[Hca], priorities: Mapping[str, Priorities | str], traffic_class: int
) -> list[Finding]:
    """Whether packets of the traffic class travel without loss.

    `priorities` has for each card, or port of a bonded one, its settings, or why they are unknown.
    """
    check = TRAFFIC_CLASS
    forced = {hca.name: hca.traffic_class for hca in hcas if hca.traffic_class not in (None, traffic_class)}
    if forced:
        rule = f"cluster.fabric.traffic_class is {traffic_class}, and the driver's value wins"
        remedy = f"write tclass={traffic_class} into /sys/class/infiniband/CARD/tc/1/traffic_class"
        return [failed(check, f"the driver forces {forced}", rule, remedy)]
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
    """What the cards (name -> counters) counted while the fabric was measured."""
    check = COUNTERS
    if not any(before.values()):
        return skipped(check, "the cards show no counters")
    grown = {
        (card, name): count - before[card][name]
        for card, counts in after.items()
        for name, count in counts.items()
        if count > before.get(card, {}).get(name, count)
    }
    lost = [f"{card} {name} +{count}" for (card, name), count in grown.items() if LOST.fullmatch(name)]
    if lost:
        rule = "no packet may be lost: RDMA sends the whole message again"
        remedy = "check PFC on switch and card, cables, and the switch port's counters"
        num_lost = sum(count for (_, name), count in grown.items() if LOST.fullmatch(name))
        flapped = any("link" in name for _, name in grown)
        judged = failed if flapped or num_lost >= MANY_LOST else warned
        return judged(check, ", ".join(lost), rule, remedy)
    pauses = sum(count for (_, name), count in grown.items() if PAUSES.fullmatch(name))
    return passed(check, f"no loss, {pauses} pause frames while measuring")
