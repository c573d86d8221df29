"""Checks of the priority that pauses instead of dropping.

RoCE needs one priority with priority flow control (PFC), where a full receiver pauses its sender. A packet's
traffic class selects the priority: its upper six bits are the DSCP, which the card maps to a priority. The
priority needs a receive buffer of its own, from which it can tell when to pause.
"""

from collections.abc import Mapping, Sequence

from launch.preflight.findings import Finding, failed, passed, skipped, warned
from launch.preflight.hcas import Hca, name_cards
from launch.preflight.priorities import Priorities

TRAFFIC_CLASS, BUFFERS = LOSSLESS_CHECKS = ("traffic class", "receive buffers")
NO_CARDS = "no card of the cluster file was found"

Known = Mapping[str, Priorities | str]
"""Card, or port of a bonded card -> its settings, or why they are unknown."""


def judge_lossless(hcas: Sequence[Hca], priorities: Known, traffic_class: int) -> list[Finding]:
    """Check that packets of the traffic class are on a lossless priority with a buffer of its own."""
    if not hcas:
        return [skipped(check, NO_CARDS) for check in LOSSLESS_CHECKS]
    return [
        *_judge_class(hcas, priorities, traffic_class),
        _judge_buffers(hcas, priorities, traffic_class >> 2),
    ]


def _judge_class(hcas: Sequence[Hca], priorities: Known, traffic_class: int) -> list[Finding]:
    check = TRAFFIC_CLASS
    # 1. Does the driver override the traffic class?
    forced = {hca.name: hca.traffic_class for hca in hcas if hca.traffic_class not in (None, traffic_class)}
    if forced:
        rule = f"cluster.fabric.traffic_class is {traffic_class}, and the driver's value wins"
        remedy = f"write tclass={traffic_class} into /sys/class/infiniband/CARD/tc/PORT/traffic_class"
        return [failed(check, f"the driver forces {forced}", rule, remedy)]
    # 2. Is its DSCP mapped to a lossless priority on every card whose settings are known?
    dscp = traffic_class >> 2
    rule = f"traffic class {traffic_class} is DSCP {dscp}, whose priority must be lossless"
    findings = []
    for name, known in priorities.items():
        if isinstance(known, str):
            continue
        priority = known.by_dscp.get(dscp)
        if known.trust != "dscp":
            found = f"{name} takes the priority from {known.trust}"
            remedy = (
                "mlnx_qos -i INTERFACE --trust dscp, or dcb app add dev INTERFACE dscp-prio DSCP:PRIORITY"
            )
            findings.append(failed(check, found, rule, remedy))
        elif priority not in known.lossless:
            found = f"{name} puts it on priority {priority}, flow control is on {list(known.lossless)}"
            remedy = (
                "mlnx_qos -i INTERFACE --pfc ... (or dcb pfc set), on switches too, or correct "
                "cluster.fabric.traffic_class"
            )
            findings.append(failed(check, found, rule, remedy))
    unknown = _unknown(hcas, priorities)
    if findings or unknown:
        return findings or [skipped(check, unknown)]
    used = sorted({known.by_dscp[dscp] for known in priorities.values() if not isinstance(known, str)})
    return [
        passed(check, f"{traffic_class} is DSCP {dscp}, on lossless priority {', '.join(map(str, used))}")
    ]


def _judge_buffers(hcas: Sequence[Hca], priorities: Known, dscp: int) -> Finding:
    check = BUFFERS
    unknown = _unknown(hcas, priorities)
    if unknown:
        return skipped(check, unknown)
    empty, shared, silent, sizes = [], [], [], set()
    for name, known in priorities.items():
        priority = known.by_dscp.get(dscp) if not isinstance(known, str) else None
        if isinstance(known, str) or priority not in known.lossless:
            return skipped(check, "no lossless priority carries the traffic class")
        number = known.buffers.get(priority)
        if number is None or number >= len(known.buffer_bytes):
            silent.append(name)
        elif not known.buffer_bytes[number]:
            empty.append(name)
        elif any(known.buffers[other] == number for other in known.buffers if other not in known.lossless):
            shared.append(name)
        else:
            sizes.add(known.buffer_bytes[number])
    remedy = (
        "mlnx_qos -i INTERFACE --prio2buffer ... --buffer_size ..., or let the driver set them again by --pfc"
    )
    rule = "a lossless priority needs a receive buffer of its own, in which packets wait while senders pause"
    if empty:
        found = f"that of the lossless priority has no bytes on {name_cards(empty, len(priorities))}"
        return failed(check, found, rule, remedy)
    if shared:
        found = (
            f"lossy priorities use that of the lossless one, too, on {name_cards(shared, len(priorities))}"
        )
        return warned(check, found, rule, remedy)
    if silent:
        return skipped(check, f"not shown by the tool for {name_cards(silent, len(priorities))}")
    return passed(check, f"{' and '.join(f'{size:,}' for size in sorted(sizes))} bytes, not shared")


def _unknown(hcas: Sequence[Hca], priorities: Known) -> str:
    """Why the settings of some cards are unknown; empty if all are known."""
    reasons = [known for known in priorities.values() if isinstance(known, str)]
    if reasons:
        return reasons[0]
    hidden = [hca.name for hca in hcas if not hca.interfaces]
    return f"no network interface of {name_cards(hidden, len(hcas))} is visible here" if hidden else ""
