"""PCIe side of the network cards: the link's speed and width, and settings of its requests."""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from launch.preflight.findings import Finding, failed, passed, skipped, warned
from launch.preflight.hcas import FOLDER, Hca, name_cards
from launch.preflight.system import System

SLOT, REQUESTS = PCIE_CHECKS = ("card PCIe link", "card PCIe requests")
NO_CARDS = "no card of the cluster file was found"
ENCODED = 128 / 130
"""Share of a transfer that is data, from 8 GT/s on."""
FAST_GBPS = 200.0
LARGE_READ_BYTES = 4096
"""Read requests that a card of 200 Gb/s or more needs to hide the latency of reads from GPUs (NVIDIA's tuning
guides); 512, the usual value, is enough for slower ones."""
SMALL_READ_BYTES = 512

STATUS, FIRST_CAPABILITY, EXPRESS = 0x06, 0x34, 0x10
"""Offsets in PCI's configuration space, and the identifier of PCI Express among its capabilities."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Slot:
    """PCIe of a card; None for values that are not shown, as for a virtual function."""

    gt_per_s: float | None
    lanes: int | None
    max_lanes: int | None
    read_bytes: int | None
    """Size of the largest read request, MaxReadReq."""
    is_relaxed: bool | None
    """Whether the card may let its writes overtake each other (relaxed ordering)."""


def read_slots(system: System, hcas: Sequence[Hca]) -> dict[str, Slot]:
    """Card -> its slot."""
    return {hca.name: _read_slot(system, f"{FOLDER}/{hca.card.device}/device") for hca in hcas}


def judge_slots(hcas: Sequence[Hca], slots: Mapping[str, Slot]) -> list[Finding]:
    """Check that PCIe is as fast as the port, and large reads and relaxed ordering are on."""
    if not hcas:
        return [skipped(check, NO_CARDS) for check in PCIE_CHECKS]
    return [_judge_link(hcas, slots), _judge_requests(hcas, slots)]


def device_control(config: bytes) -> int | None:
    """The Device Control register of a PCI function's configuration space; None if it is not in there.

    Who is not root reads the first 64 bytes only, which end before it.
    """
    if len(config) <= 64 or not config[STATUS] & 0x10:
        return None
    at = config[FIRST_CAPABILITY] & ~3
    # Capabilities are a list; a broken device's may have no end.
    for _ in range(48):
        if not 64 <= at <= len(config) - 10:
            return None
        if config[at] == EXPRESS:
            return int.from_bytes(config[at + 8 : at + 10], "little")
        at = config[at + 1] & ~3
    return None


def _read_slot(system: System, folder: str) -> Slot:
    def number(name: str) -> float | None:
        match = re.match(r"\d+(\.\d+)?", system.read(f"{folder}/{name}") or "")
        # A link that is down, or a virtual function's, has 0.
        return (float(match[0]) or None) if match else None

    def whole(name: str) -> int | None:
        value = number(name)
        return None if value is None else int(value)

    # A virtual function follows its physical one; its own register holds zeros.
    is_virtual = bool(system.names(f"{folder}/physfn"))
    control = None if is_virtual else device_control(system.read_bytes(f"{folder}/config"))
    return Slot(
        gt_per_s=number("current_link_speed"),
        lanes=whole("current_link_width"),
        max_lanes=whole("max_link_width"),
        read_bytes=None if control is None else 128 << (control >> 12 & 7),
        is_relaxed=None if control is None else bool(control & 0x10),
    )


def _judge_link(hcas: Sequence[Hca], slots: Mapping[str, Slot]) -> Finding:
    check = SLOT
    slow, narrow, unknown = [], [], []
    speeds = [slot.gt_per_s for slot in slots.values() if slot.gt_per_s]
    for hca in hcas:
        slot = slots[hca.name]
        if slot.gt_per_s is None or slot.lanes is None or slot.max_lanes is None:
            unknown.append(hca.name)
            continue
        text = f"{hca.name}: {slot.gt_per_s:g} GT/s x{slot.lanes}"
        if slot.gt_per_s * slot.lanes * ENCODED < (hca.rate_gbps or 0.0):
            slow.append(f"{text} for {hca.rate_gbps:g} Gb/s")
        elif slot.lanes < slot.max_lanes or slot.gt_per_s < max(speeds):
            narrow.append(f"{text}, others {max(speeds):g} GT/s, of {slot.max_lanes} lanes")
    remedy = "reseat the card, check BIOS and riser, and drain the node"
    if slow:
        return failed(check, "; ".join(slow), "PCIe must be as fast as the port", remedy)
    if narrow:
        return warned(
            check, "; ".join(narrow), "all lanes must be up, at the speed of the other cards", remedy
        )
    if unknown:
        return skipped(check, f"speed and width of {name_cards(unknown, len(hcas))} are not shown")
    kinds = sorted({f"{slot.gt_per_s:g} GT/s x{slot.lanes}" for slot in slots.values()})
    return passed(check, f"{' and '.join(kinds)} each")


def _judge_requests(hcas: Sequence[Hca], slots: Mapping[str, Slot]) -> Finding:
    check = REQUESTS
    small, strict, unknown = [], [], []
    sizes: set[int] = set()
    for hca in hcas:
        slot = slots[hca.name]
        if slot.read_bytes is None:
            unknown.append(hca.name)
            continue
        if slot.read_bytes < (LARGE_READ_BYTES if (hca.rate_gbps or 0.0) >= FAST_GBPS else SMALL_READ_BYTES):
            small.append(hca.name)
            sizes.add(slot.read_bytes)
        if not slot.is_relaxed:
            strict.append(hca.name)
    found = []
    if small:
        listed = " and ".join(map(str, sorted(sizes)))
        found.append(f"MaxReadReq is {listed} bytes on {name_cards(small, len(hcas))}")
    if strict:
        found.append(f"relaxed ordering is off on {name_cards(strict, len(hcas))}")
    if found:
        rule = f"reads of {LARGE_READ_BYTES} bytes from {FAST_GBPS:g} Gb/s on, and relaxed ordering"
        remedy = "setpci -s SLOT CAP_EXP+8.w: set bits 14 to 12 to 5, and bit 4; or both in the BIOS"
        return warned(check, "; ".join(found), rule, remedy)
    if unknown:
        cards = name_cards(unknown, len(hcas))
        return skipped(check, f"only root reads those of {cards}, and not of virtual functions (lspci -vv)")
    read = sorted({slot.read_bytes for slot in slots.values() if slot.read_bytes})
    return passed(check, f"MaxReadReq {' and '.join(map(str, read))} bytes, relaxed ordering on")
