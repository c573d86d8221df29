"""Check of congestion control (DCQCN): switches mark packets, receivers answer marks, senders slow down.

A receiver, the notification point, answers a marked packet (ECN) with a notification (CNP); the sender, the
reaction point, then lowers its rate. Without either, only pauses hold senders back, and they spread over the
fabric. Files are those of NVIDIA's driver; the kernel's own has the counters alone.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from launch.preflight.counters import CONGESTION, Counters, Growth, growth
from launch.preflight.findings import Finding, passed, skipped, warned
from launch.preflight.hcas import NET, Hca, name_cards
from launch.preflight.priorities import Priorities
from launch.preflight.system import Missing, System

ECN = "congestion control"
POINTS = {"roce_np": "answering marks (roce_np)", "roce_rp": "slowing down (roce_rp)"}


@dataclass(frozen=True, slots=True, kw_only=True)
class Congestion:
    """Priorities of a card on which congestion control is on."""

    answers: tuple[int, ...]
    """As the receiver, the notification point."""
    slows: tuple[int, ...]
    """As the sender, the reaction point."""


def read_congestion(system: System, hcas: Sequence[Hca]) -> dict[str, Congestion | Missing]:
    """Card -> its settings; of a card of several ports, what is on for all of them."""
    found: dict[str, Congestion | Missing] = {}
    for hca in hcas:
        by_point = [
            [_enabled(system, f"{NET}/{name}/ecn/{point}/enable") for name in hca.interfaces]
            for point in POINTS
        ]
        if not hca.interfaces or any(own is None for point in by_point for own in point):
            reason = "the driver shows no /sys/class/net/INTERFACE/ecn, as NVIDIA's does"
            found[hca.name] = Missing(reason=reason)
            continue
        answers, slows = (
            tuple(sorted(set.intersection(*(own or set() for own in point)))) for point in by_point
        )
        found[hca.name] = Congestion(answers=answers, slows=slows)
    return found


def judge_congestion(
    states: Mapping[str, Congestion | Missing],
    priorities: Mapping[str, Priorities | str],
    traffic_class: int,
    before: Counters,
    after: Counters | Missing,
) -> Finding:
    """Check that congestion control is on for the traffic class, and that notifications were acted upon."""
    check = ECN
    if not states:
        return skipped(check, "no card of the cluster file was found")
    # 1. Settings, for the priority of the traffic class.
    dscp = traffic_class >> 2
    used = {own.by_dscp.get(dscp) for own in priorities.values() if not isinstance(own, str)}
    remedy = "write 1 into /sys/class/net/INTERFACE/ecn/roce_np/enable/PRIORITY and roce_rp/enable/PRIORITY"
    off = {
        text: name_cards(cards, len(states))
        for point, text in POINTS.items()
        if (cards := [card for card, own in states.items() if _lacks(own, point, used)])
    }
    if off:
        found = "; ".join(f"{text} is off on {cards}" for text, cards in off.items())
        rule = f"both must be on for the priority of traffic class {traffic_class}"
        return warned(check, found, rule, remedy)
    # 2. Counters: marks must be answered, notifications obeyed.
    grown = {} if isinstance(after, Missing) else growth(before, after, CONGESTION)
    ignoring = [card for card, own in grown.items() if own.get("rp_cnp_ignored")]
    silent = [
        card
        for card, own in grown.items()
        if own.get("np_ecn_marked_roce_packets") and own.get("np_cnp_sent") == 0
    ]
    for cards, text in (
        (silent, "received marked packets, and answered none"),
        (ignoring, "ignored notifications"),
    ):
        if cards:
            rule = "senders must slow down when switches are congested"
            return warned(check, f"{name_cards(cards, len(states))} {text} while measuring", rule, remedy)
    return _not_off(states, used, grown)


def _not_off(states: Mapping[str, Congestion | Missing], used: set[int | None], grown: Growth) -> Finding:
    """What to say if nothing is wrong: passed if it is known to be on."""
    counted = {name: sum(own.get(name, 0) for own in grown.values()) for name in sorted(_names(grown))}
    counts = ", ".join(f"{name} +{count}" for name, count in counted.items()) or "its counters are not shown"
    unknown = [own.reason for own in states.values() if isinstance(own, Missing)]
    if unknown and not counted.get("np_cnp_sent") and not counted.get("rp_cnp_handled"):
        return skipped(ECN, f"{unknown[0]}; {counts}")
    known = {priority for priority in used if priority is not None}
    if not unknown and not known:
        return skipped(ECN, f"the priority of the traffic class is unknown; {counts}")
    on = "seen at work" if unknown else f"on for priority {', '.join(map(str, sorted(known)))}"
    return passed(ECN, f"{on}; {counts}")


def _names(grown: Growth) -> set[str]:
    return {name for own in grown.values() for name in own}


def _lacks(own: Congestion | Missing, point: str, used: set[int | None]) -> bool:
    if isinstance(own, Missing):
        return False
    enabled = own.answers if point == "roce_np" else own.slows
    return any(priority not in enabled for priority in used if priority is not None)


def _enabled(system: System, folder: str) -> set[int] | None:
    values = {int(name): system.read(f"{folder}/{name}") for name in system.names(folder) if name.isdigit()}
    return {priority for priority, value in values.items() if value == "1"} if values else None
