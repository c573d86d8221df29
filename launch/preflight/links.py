"""Checks of the cards' links: how often they went down, and how many bits arrive wrong.

Links of 50 Gb/s per lane and more (PAM4) always have bit errors, which forward error correction (FEC)
repairs; what matters is how close they are to what it can repair, and whether anything is left.
"""

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from launch.preflight.counters import BIT_ERRORS, CORRECTED_BITS, FLAPS, Counters, growth, without_counters
from launch.preflight.findings import Finding, failed, passed, skipped, warned
from launch.preflight.hcas import FOLDER, Hca, name_cards
from launch.preflight.system import AbsentError, BrokenError, Missing, System, try_to_read

FLAP, BITS, FEC = LINK_CHECKS = ("link flaps", "bit errors", "error correction")
MANY_FLAPS = 5
"""Losses of a link from which they are looked at; fewer come with maintenance. Our choice."""
FLAPS_PER_DAY = 1.0
MANY_ERRORS = 100
"""Errors while measuring from which a node fails. Our choice."""
MAX_RAW_BER = 1e-5
"""Bit error rate before correction from which a link is close to failing: RS(544,514) repairs up to 2.4e-4
(IEEE 802.3, clause 124), and sound links have 1e-6 or less. Our choice."""
MAX_EFFECTIVE_BER = 1e-12
"""Bit error rate after correction that IEEE 802.3 asks of a link."""
PAM4_GBPS = 200.0
"""Rate from which all links use PAM4 and need error correction."""
TOOLS = ("mlxlink", "mstlink")
"""The same tool as in NVIDIA's firmware tools and in distributions (mstflint); needs root."""
SECTION = "Physical Counters and BER Info"


@dataclass(frozen=True, slots=True, kw_only=True)
class Link:
    """What is known of a card's link apart from counters."""

    fec: str | Missing
    """Active error correction, as ethtool names it: RS, LLRS, BaseR, Off, None."""
    effective_ber: float | Missing
    """Bit error rate after correction, since the card's counters were cleared."""


def read_links(system: System, hcas: Sequence[Hca]) -> dict[str, Link]:
    """Card -> its link."""
    return {
        hca.name: Link(
            fec=try_to_read(_read_fec, system, hca),
            effective_ber=try_to_read(_read_ber, system, hca),
        )
        for hca in hcas
    }


def judge_links(
    hcas: Sequence[Hca], links: Mapping[str, Link], before: Counters, after: Counters | Missing
) -> list[Finding]:
    """Check the links of the cards in use; without measurements, what happened since the node started."""
    if not hcas:
        return [skipped(check, "no card of the cluster file was found") for check in LINK_CHECKS]
    later = before if isinstance(after, Missing) else after
    rates = {hca.name: hca.rate_gbps for hca in hcas}
    return [_judge_flaps(before, later), _judge_bits(rates, links, before, later), _judge_fec(rates, links)]


def _judge_flaps(before: Counters, after: Counters) -> Finding:
    check = FLAP
    # 1. A link that goes down now breaks the job.
    grown = growth(before, after, FLAPS)
    now = [f"{card} {name} +{n}" for card, own in grown.items() for name, n in own.items() if n]
    remedy = "reseat or replace cable and transceiver, and check the switch port; drain the node"
    if now:
        return failed(check, f"while measuring: {', '.join(now)}", "a link must stay up", remedy)
    # 2. One that went down often will again. Counters of driver and kernel are of the same events.
    days = (after.uptime_s or 0.0) / 86400
    losses = {
        card: max((n for name, n in own.items() if FLAPS.fullmatch(name)), default=0)
        for card, own in after.counts.items()
    }
    often = {card: n for card, n in losses.items() if n >= MANY_FLAPS and n > FLAPS_PER_DAY * days}
    if often:
        found = ", ".join(f"{card} was down {n} times" for card, n in often.items())
        rule = f"at most {MANY_FLAPS - 1} times, or once a day: the node is up for {days:.1f} days"
        return warned(check, found, rule, remedy)
    reason = without_counters(before, after, grown)
    return skipped(check, reason) if reason else passed(check, f"at most {max(losses.values())} since boot")


def _judge_bits(
    rates: Mapping[str, float | None], links: Mapping[str, Link], before: Counters, after: Counters
) -> Finding:
    check = BITS
    remedy = "clean, reseat or replace cable and transceiver, and check the switch port; drain the node"
    # 1. Errors that were not repaired while measuring, and as the card counts them since it was cleared.
    grown = growth(before, after, BIT_ERRORS)
    now = {(card, name): n for card, own in grown.items() for name, n in own.items() if n}
    if now:
        found = ", ".join(f"{card} {name} +{n}" for (card, name), n in now.items())
        judged = failed if sum(now.values()) >= MANY_ERRORS else warned
        return judged(check, found, "no symbol may be wrong after correction", remedy)
    rule = f"at most {MAX_EFFECTIVE_BER:g} after correction"
    effective = {card: link.effective_ber for card, link in links.items()}
    high = {
        card: ber for card, ber in effective.items() if isinstance(ber, float) and ber > MAX_EFFECTIVE_BER
    }
    if high:
        found = ", ".join(f"{card}: bit error rate {ber:.0e}" for card, ber in high.items())
        return warned(check, found, rule, remedy)
    # 2. Errors that are repaired, but nearly too many.
    raw = {card: _raw_ber(card, rate, before, after) for card, rate in rates.items()}
    many = {card: ber for card, ber in raw.items() if ber is not None and ber > MAX_RAW_BER}
    if many:
        found = ", ".join(f"{card}: bit error rate {ber:.0e} before correction" for card, ber in many.items())
        return warned(check, found, f"at most {MAX_RAW_BER:g}; correction ends at 2.4e-4", remedy)
    # RDMA's own counter stays at 0 on Ethernet: without those of the port, nothing was seen.
    unread = {**before.unread, **after.unread}
    seen = {card: {} if card in unread else own for card, own in grown.items()}
    if reason := without_counters(before, after, seen):
        return skipped(check, reason)
    known = [ber for ber in raw.values() if ber is not None]
    rest = f"; before correction at most {max(known):.0e}" if known else "; corrected bits are not counted"
    return passed(check, f"none after correction{rest}")


def _judge_fec(rates: Mapping[str, float | None], links: Mapping[str, Link]) -> Finding:
    check = FEC
    off = [
        card
        for card, link in links.items()
        if link.fec in ("Off", "None") and (rates[card] or 0.0) >= PAM4_GBPS
    ]
    if off:
        rule = f"links of {PAM4_GBPS:g} Gb/s and more need it"
        remedy = "ethtool --set-fec INTERFACE encoding rs, and the same on the switch port"
        return warned(check, f"off on {name_cards(off, len(links))}", rule, remedy)
    unknown = {card: link.fec.reason for card, link in links.items() if isinstance(link.fec, Missing)}
    if unknown:
        reason = next(iter(unknown.values()))
        return skipped(check, f"unknown of {name_cards(list(unknown), len(links))}: {reason}")
    kinds = sorted({str(link.fec) for link in links.values()})
    return passed(check, f"{' and '.join(kinds)} on all cards")


def _raw_ber(card: str, rate_gbps: float | None, before: Counters, after: Counters) -> float | None:
    """Share of the bits on the wire that were corrected: while measuring, or since boot if that took no time.

    Lanes carry symbols at full rate whether or not there are packets. None if it is unknown.
    """
    seconds = (after.uptime_s or 0.0) - (before.uptime_s or 0.0)
    corrected = sum(growth(before, after, CORRECTED_BITS).get(card, {}).values())
    if not seconds:
        seconds = after.uptime_s or 0.0
        counts = after.counts.get(card, {})
        corrected = sum(n for name, n in counts.items() if CORRECTED_BITS.fullmatch(name))
    is_counted = any(CORRECTED_BITS.fullmatch(name) for name in after.counts.get(card, {}))
    if not is_counted or not rate_gbps or seconds <= 0:
        return None
    return corrected / (rate_gbps * 1e9 * seconds)


def _read_fec(system: System, hca: Hca) -> str:
    if not hca.interfaces:
        raise AbsentError("it has no network interface here")
    printed = system.run(["ethtool", "--show-fec", hca.interfaces[0]])
    active = re.search(r"^Active FEC encodings?:\s*(.+?)\s*$", printed, re.MULTILINE)
    if active is None:
        raise BrokenError(f"ethtool --show-fec {hca.interfaces[0]}: names no active encoding")
    return active[1]


def _read_ber(system: System, hca: Hca) -> float:
    uevent = system.read(f"{FOLDER}/{hca.card.device}/device/uevent") or ""
    slot = re.search(r"^PCI_SLOT_NAME=(\S+)$", uevent, re.MULTILINE)
    if slot is None:
        raise AbsentError("its PCI address is not shown")
    for tool in TOOLS:
        printed = try_to_read(system.run, [tool, "-d", slot[1], "-c", "--json"])
        if not isinstance(printed, Missing):
            return _effective_ber(printed, tool)
    raise AbsentError(f"neither {' nor '.join(TOOLS)} shows it")


def _effective_ber(printed: str, tool: str) -> float:
    try:
        return float(json.loads(printed)["result"]["output"][SECTION]["Effective Physical BER"])
    except (ValueError, KeyError, TypeError) as error:
        raise BrokenError(f"{tool}: no effective bit error rate in its output") from error
