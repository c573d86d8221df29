"""Paths from each GPU to the other GPUs and to the network cards: the matrix of `nvidia-smi topo -m`."""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from launch.preflight.findings import Finding, failed, passed, skipped, warned
from launch.preflight.machine import BrokenError, Machine

PATHS = ("PIX", "PXB", "PHB", "NODE", "SYS")
"""From one PCIe switch, over several, over the CPU's root port, across the CPU, to the other socket."""
DIRECT_PATHS = PATHS[:2]
"""Paths on which a card reads a GPU's memory without passing the CPU."""

NVLINK, NEAR_CARD = PATH_CHECKS = ("NVLink", "GPU to network card")


@dataclass(frozen=True, slots=True, kw_only=True)
class Paths:
    """The matrix; keys are the names that nvidia-smi gives, cards by their RDMA names."""

    between_gpus: Mapping[tuple[int, int], str]
    """(GPU, other GPU) -> e.g. NV8 or SYS."""
    to_cards: Mapping[int, Mapping[str, str]]
    """GPU -> card, e.g. mlx5_0 -> one of `PATHS`."""


def read_paths(machine: Machine) -> Paths:
    """The matrix of this node.

    Raises:
        AbsentError: there is no nvidia-smi.
        BrokenError: it fails, or prints no matrix.
    """
    text = machine.run(["nvidia-smi", "topo", "-m"])
    # The heading is underlined on a terminal, and by some drivers elsewhere as well.
    lines = re.sub(r"\x1b\[[0-9;]*m", "", text).splitlines()
    cards = dict(re.findall(r"^\s*(NIC\d+):\s*(\S+)", text, re.MULTILINE))
    heading = next((line for line in lines if re.match(r"\s+GPU0\b", line)), None)
    if heading is None:
        raise BrokenError(f"nvidia-smi topo -m: no matrix in {' '.join(text.split())[:200]!r}")
    columns = re.findall(r"(?:GPU|NIC)\d+(?=\s|$)", heading)
    between_gpus: dict[tuple[int, int], str] = {}
    to_cards: dict[int, dict[str, str]] = {}
    for line in lines[lines.index(heading) + 1 :]:
        name, *cells = line.split()[: len(columns) + 1] or [""]
        if not re.fullmatch(r"GPU\d+", name) or len(cells) < len(columns):
            continue
        gpu = int(name[3:])
        to_cards[gpu] = {}
        for column, cell in zip(columns, cells, strict=True):
            if column.startswith("NIC"):
                # Cards of other makers appear by their own names and have no legend.
                to_cards[gpu][cards.get(column, column)] = cell
            elif cell != "X":
                between_gpus[gpu, int(column[3:])] = cell
    return Paths(between_gpus=between_gpus, to_cards=to_cards)


def judge_paths(paths: Paths, cards: Sequence[str]) -> list[Finding]:
    """NVLink between all GPUs, and for each GPU one of `cards`, those in use, near it."""
    return [_judge_nvlink(paths), _judge_cards(paths, cards)]


def _judge_nvlink(paths: Paths) -> Finding:
    check = NVLINK
    if not paths.between_gpus:
        return skipped(check, "one GPU")
    others = {pair: path for pair, path in paths.between_gpus.items() if not path.startswith("NV")}
    if others:
        (first, second), path = next(iter(others.items()))
        found = f"{len(others)} of {len(paths.between_gpus)} are other paths: GPU {first} to {second} {path}"
        remedy = (
            "check nvidia-fabricmanager (systemctl status) and nvidia-smi nvlink --status; drain the node"
        )
        return failed(check, found, "GPUs of a node must be joined by NVLink", remedy)
    return passed(check, f"{', '.join(sorted(set(paths.between_gpus.values())))} between all GPUs")


def _judge_cards(paths: Paths, cards: Sequence[str]) -> Finding:
    check = NEAR_CARD
    if not cards:
        return skipped(check, "no RDMA network card in use")
    nearest: dict[int, list[str]] = {}
    far = []
    for gpu, by_card in paths.to_cards.items():
        known = {card: by_card[card] for card in cards if by_card.get(card) in PATHS}
        if not known:
            missing = f"nvidia-smi topo -m does not show {', '.join(cards)}"
            return skipped(check, missing)
        best = min(known.values(), key=PATHS.index)
        nearest[gpu] = [card for card, path in known.items() if path == best]
        if best not in DIRECT_PATHS:
            far.append(f"GPU {gpu}: nearest is {nearest[gpu][0]} by {best}")
    rule = (
        f"each GPU needs a card by {' or '.join(DIRECT_PATHS)}; others pass the CPU at about half the speed"
    )
    if far:
        remedy = "check cluster.fabric.hcas and the PCIe slots; in a virtual machine, its PCIe topology"
        return warned(check, "; ".join(far), rule, remedy)
    unused = sorted(set(cards) - {card for near in nearest.values() for card in near})
    if unused and len(cards) <= len(nearest):
        found = f"{', '.join(unused)} is nearest to no GPU"
        return warned(check, found, "each GPU should have a card of its own", "check cluster.fabric.hcas")
    return passed(check, f"all {len(nearest)} GPUs have one by {' or '.join(DIRECT_PATHS)}")
