"""Paths from each GPU to the other GPUs and to the network cards: the matrix of `nvidia-smi topo -m`."""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from launch.preflight.findings import Finding, failed, passed, skipped, warned
from launch.preflight.system import BrokenError, System

PATHS = ("PIX", "PXB", "PHB", "NODE", "SYS")
"""PCIe paths, best first: one switch, several switches, CPU root port, across the CPU, across sockets."""
DIRECT_PATHS = PATHS[:2]
"""Paths on which a card reads a GPU's memory without going through the CPU."""

NVLINK, NEAR_CARD = PATH_CHECKS = ("NVLink", "GPU to network card")


@dataclass(frozen=True, slots=True, kw_only=True)
class Paths:
    """The matrix; GPUs by nvidia-smi's index, cards by their RDMA names."""

    between_gpus: Mapping[tuple[int, int], str]
    """(GPU, other GPU) -> path, e.g. NV8 or SYS."""
    to_cards: Mapping[int, Mapping[str, str]]
    """GPU -> card, e.g. mlx5_0 -> path, one of `PATHS`."""


def read_paths(system: System) -> Paths:
    """The matrix of this node.

    Raises:
        AbsentError: there is no nvidia-smi.
        BrokenError: it fails, or prints no matrix.
    """
    text = system.run(["nvidia-smi", "topo", "-m"])
    # The heading is underlined on a terminal, and by some drivers elsewhere, too.
    lines = re.sub(r"\x1b\[[0-9;]*m", "", text).splitlines()
    cards = dict(re.findall(r"^\s*(NIC\d+):\s*(\S+)", text, re.MULTILINE))
    heading = next((line for line in lines if re.match(r"\s+GPU0\b", line)), None)
    if heading is None:
        raise BrokenError(f"nvidia-smi topo -m: no matrix in {' '.join(text.split())[:200]!r}")
    # One row per GPU; its cells are paths to GPUs and cards, in the order of the columns.
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
                # Cards of other vendors appear under their own names and are not in the legend.
                to_cards[gpu][cards.get(column, column)] = cell
            elif cell != "X":
                between_gpus[gpu, int(column[3:])] = cell
    return Paths(between_gpus=between_gpus, to_cards=to_cards)


def judge_paths(paths: Paths, num_gpus: int, cards: Sequence[str]) -> list[Finding]:
    """Check for NVLink between all of the node's GPUs, and for one of `cards`, those in use, near each."""
    if len(paths.to_cards) < num_gpus:
        reason = f"nvidia-smi topo -m shows {len(paths.to_cards)} of {num_gpus} GPUs"
        return [skipped(check, reason) for check in PATH_CHECKS]
    return [_judge_nvlink(paths), _judge_cards(paths, cards)]


def _judge_nvlink(paths: Paths) -> Finding:
    check = NVLINK
    num_gpus = len(paths.to_cards)
    if num_gpus < 2:
        return skipped(check, "one GPU" if num_gpus else "no GPU")
    if len(paths.between_gpus) < num_gpus * (num_gpus - 1):
        return skipped(check, "nvidia-smi topo -m does not show the paths of all pairs")
    others = {pair: path for pair, path in paths.between_gpus.items() if not path.startswith("NV")}
    if others:
        (first, second), path = next(iter(others.items()))
        found = f"{len(others)} of {len(paths.between_gpus)} are other paths: GPU {first} to {second} {path}"
        remedy = (
            "check nvidia-fabricmanager (systemctl status) and nvidia-smi nvlink --status; drain the node"
        )
        return failed(check, found, "GPUs of a node must be connected by NVLink", remedy)
    return passed(check, f"{', '.join(sorted(set(paths.between_gpus.values())))} between all GPUs")


def _judge_cards(paths: Paths, cards: Sequence[str]) -> Finding:
    check = NEAR_CARD
    if not cards or not paths.to_cards:
        return skipped(check, "no RDMA network card in use" if paths.to_cards else "no GPU")
    # The nearest cards of each GPU.
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
    rule = f"each GPU needs a card by {' or '.join(DIRECT_PATHS)}; others go via the CPU at half the speed"
    # Is one direct, and does every card have a GPU?
    if far:
        remedy = "check cluster.fabric.hcas and the PCIe slots; in a virtual machine, its PCIe topology"
        return warned(check, "; ".join(far), rule, remedy)
    unused = sorted(set(cards) - {card for near in nearest.values() for card in near})
    if unused and len(cards) <= len(nearest):
        found = f"{', '.join(unused)} is not the nearest card of any GPU"
        return warned(check, found, "each GPU should have a separate card", "check cluster.fabric.hcas")
    return passed(check, f"all {len(nearest)} GPUs have one by {' or '.join(DIRECT_PATHS)}")
