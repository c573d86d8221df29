"""Counters of the cards, read before and after the fabric is measured, and checks of packets lost meanwhile.

RDMA's counters are files in sysfs, Ethernet's are printed by ethtool. Names are those of NVIDIA's mlx5 driver
(kernel documentation, mlx5/counters) and of Broadcom's bnxt_re and bnxt_en.
"""

import re
from collections.abc import Mapping
from dataclasses import dataclass

from launch.preflight.findings import Finding, failed, passed, skipped, warned
from launch.preflight.hcas import FOLDER, NET, Hca, name_cards
from launch.preflight.system import Missing, System, try_to_read

LOST_BY_RDMA = re.compile(
    r"packet_seq_err|implied_nak_seq_err|local_ack_timeout_err|rnr_nak_retry_err"
    r"|req_transport_retries_exceeded|rx_icrc_encapsulated|port_rcv_errors"
    r"|seq_err_naks_rcvd|to_retransmits|max_retry_exceeded"
)
LOST_BY_ETHERNET = re.compile(
    r"(rx|tx)_(prio\d_|roce_)?discards(_phy)?|rx_prio\d_(buf|cong)_discard(_phy)?|rx_fcs_err_frames"
)
PAUSES = re.compile(r"(rx|tx)_prio(\d)_pause|(rx|tx)_pfc_ena_frames_pri(\d)")
"""Pause frames by priority."""
FLAPS = re.compile(r"link_downed|link_down_events(_phy)?|carrier_losses")
BIT_ERRORS = re.compile(r"symbol_error|rx_symbol_err_phy|rx_crc_errors_phy|rx_pcs_symbol_err(_phy)?")
"""Symbols that error correction did not repair, and packets with a wrong checksum."""
CORRECTED_BITS = re.compile(r"rx_corrected_bits(_phy)?")
CONGESTION = re.compile(r"np_cnp_sent|np_ecn_marked_roce_packets|rp_cnp_handled|rp_cnp_ignored")
READ = (LOST_BY_RDMA, LOST_BY_ETHERNET, PAUSES, FLAPS, BIT_ERRORS, CORRECTED_BITS, CONGESTION)
MANY_LOST = 100
"""Number of lost packets from which a node fails: a few may be another user's of the card. Our choice."""

RDMA_LOSS, ETHERNET_LOSS = LOSS_CHECKS = ("RDMA loss", "Ethernet loss")
SOURCES = {RDMA_LOSS: LOST_BY_RDMA, ETHERNET_LOSS: LOST_BY_ETHERNET}


@dataclass(frozen=True, slots=True, kw_only=True)
class Counters:
    """The counters of all cards in use, at one time."""

    uptime_s: float | None
    """Time since the node started."""
    counts: Mapping[str, Mapping[str, int]]
    """Card -> counter -> count since its driver was loaded."""
    unread: Mapping[str, str]
    """Card -> why the counters of its Ethernet port could not be read."""


Growth = Mapping[str, Mapping[str, int]]
"""Card -> counter -> by how much it grew."""


def read_counters(system: System, hcas: list[Hca]) -> Counters:
    """Read the cards' counters. Those of an interface without any (macvlan in a container) are missing."""
    uptime = re.match(r"[\d.]+", system.read("proc/uptime") or "")
    counts: dict[str, dict[str, int]] = {}
    unread: dict[str, str] = {}
    for hca in hcas:
        own = _read_rdma(system, hca)
        for interface in hca.interfaces:
            printed = try_to_read(system.run, ["ethtool", "-S", interface])
            if isinstance(printed, Missing):
                absent = printed.reason.endswith("is not installed")
                hint = ": install it on the node and in the container" if absent else ""
                unread[hca.name] = f"{printed.reason}{hint}"
            else:
                for name, count in re.findall(r"^\s+(\w+): (\d+)$", printed, re.MULTILINE):
                    own[name] = own.get(name, 0) + int(count)
            # Both edges are counted, by older kernels in one number.
            if (changes := _number(system, f"{NET}/{interface}/carrier_changes")) is not None:
                losses = _number(system, f"{NET}/{interface}/carrier_down_count")
                own["carrier_losses"] = own.get("carrier_losses", 0) + (
                    changes // 2 if losses is None else losses
                )
        counts[hca.name] = {
            name: count for name, count in own.items() if any(names.fullmatch(name) for names in READ)
        }
    return Counters(uptime_s=float(uptime[0]) if uptime else None, counts=counts, unread=unread)


def growth(before: Counters, after: Counters, names: re.Pattern[str]) -> Growth:
    """Growth of counters with these names that both readings show; none of a card that was reset."""
    grown: dict[str, dict[str, int]] = {}
    for card, counts in before.counts.items():
        own = {
            name: count - counts[name]
            for name, count in after.counts.get(card, {}).items()
            if names.fullmatch(name) and name in counts
        }
        grown[card] = own if all(count >= 0 for count in own.values()) else {}
    return grown


def without_counters(before: Counters, after: Counters, grown: Growth) -> str:
    """Why some of the cards show none of the counters in `grown`; empty if all show some."""
    if not grown:
        return "no card of the cluster file was found"
    silent = [card for card, counts in grown.items() if not counts]
    if not silent:
        return ""
    unread = {**after.unread, **before.unread}
    reason = unread.get(silent[0], "their driver shows none of them, or was reset while measuring")
    return f"no such counters of {name_cards(silent, len(grown))}: {reason}"


def judge_loss(before: Counters, after: Counters | Missing) -> list[Finding]:
    """Compare the counters of lost packets before and after the fabric was measured."""
    if isinstance(after, Missing):
        return [skipped(check, after.reason) for check in LOSS_CHECKS]
    findings = []
    for check, names in SOURCES.items():
        grown = growth(before, after, names)
        lost = {(card, name): n for card, own in grown.items() for name, n in own.items() if n}
        if lost:
            found = ", ".join(f"{card} {name} +{count}" for (card, name), count in lost.items())
            rule = "no packet may be lost: RDMA retransmits the whole message"
            remedy = "check PFC on switch and card, cables, and the switch port's counters"
            judged = failed if sum(lost.values()) >= MANY_LOST else warned
            findings.append(judged(check, found, rule, remedy))
        elif reason := without_counters(before, after, grown):
            findings.append(skipped(check, reason))
        else:
            findings.append(passed(check, f"none while measuring{_pauses(before, after, check)}"))
    return findings


def _pauses(before: Counters, after: Counters, check: str) -> str:
    if check != ETHERNET_LOSS:
        return ""
    pauses = growth(before, after, PAUSES)
    return f", {sum(sum(own.values()) for own in pauses.values())} pause frames"


def _read_rdma(system: System, hca: Hca) -> dict[str, int]:
    port = f"{FOLDER}/{hca.card.device}/ports/{hca.card.port}"
    return {
        name: int(text)
        for folder in (f"{port}/counters", f"{port}/hw_counters")
        for name in system.names(folder)
        if (text := system.read(f"{folder}/{name}") or "").isdigit()
    }


def _number(system: System, path: str) -> int | None:
    text = system.read(path) or ""
    return int(text) if text.isdigit() else None
