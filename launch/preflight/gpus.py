"""GPUs of a node as reported by nvidia-smi, and checks of them."""

import csv
import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

from launch.preflight.findings import Finding, failed, passed, skipped, warned
from launch.preflight.system import BrokenError, System

FIELDS = (
    "index",
    "name",
    "driver_version",
    "pci.bus_id",
    "memory.total",
    "mig.mode.current",
    "ecc.mode.current",
    "ecc.errors.uncorrected.volatile.total",
    "pcie.link.width.current",
    "pcie.link.width.max",
)
"""Fields queried from nvidia-smi (`nvidia-smi --help-query-gpu`)."""
REMAP_FIELDS = ("gpu_bus_id", "remapped_rows.pending", "remapped_rows.failure")
"""Fields queried on remapped rows (`nvidia-smi --help-query-remapped-rows`)."""
BROKEN_VALUES = {"[GPU requires reset]", "[GPU is lost]"}
"""Values that replace unreadable fields of a GPU that no longer works; its name remains readable."""

COUNT, MEMORY_ERRORS, LANES, MODES = GPU_CHECKS = (
    "GPU count",
    "GPU memory errors",
    "GPU PCIe lanes",
    "GPU modes",
)
THROTTLING = "GPU throttling"

# Bits of nvmlClocksEventReasons. Idle (1), application clocks (2), the power cap (4), sync boost (16) and the
# display (256) are normal; under load, a GPU runs at its power cap.
SLOWDOWN_BITS = {
    0x08: "hardware slowdown",
    0x40: "hardware thermal slowdown",
    0x80: "power brake",
    0x20: "software thermal slowdown",
}
HARDWARE_BITS = 0x08 | 0x40 | 0x80


@dataclass(frozen=True, slots=True, kw_only=True)
class Gpu:
    """One GPU; None for values that it does not report."""

    index: int
    name: str
    driver: str
    bus_id: str
    memory_mib: int | None
    is_split: bool | None
    """Whether MIG splits the GPU."""
    has_ecc: bool | None
    uncorrected_errors: int | None
    """Memory errors since the driver was loaded that ECC could not correct."""
    pcie_lanes: int | None
    max_pcie_lanes: int | None
    remap_pending: bool | None
    """Whether a broken memory row will be replaced at the next reset."""
    remap_failed: bool | None
    """Whether the GPU has run out of spare rows."""
    is_broken: bool
    """Whether nvidia-smi reports, in place of any value, that the GPU is lost or must be reset."""


def read_gpus(system: System) -> list[Gpu]:
    """The GPUs in the order of their indices.

    Raises:
        AbsentError: nvidia-smi is not installed.
        BrokenError: nvidia-smi fails or prints something unexpected.
    """
    # Remapped rows are a separate query, joined by PCI address.
    rows = _query(system, "gpu", FIELDS)
    remaps = {row["gpu_bus_id"]: row for row in _query(system, "remapped-rows", REMAP_FIELDS)}
    gpus = []
    for row in rows:
        remap = remaps.get(row["pci.bus_id"], {})
        gpus.append(
            Gpu(
                index=_parse_int(row["index"]),
                name=row["name"],
                driver=row["driver_version"],
                bus_id=row["pci.bus_id"],
                memory_mib=_number(row["memory.total"]),
                is_split=_switch(row["mig.mode.current"]),
                has_ecc=_switch(row["ecc.mode.current"]),
                uncorrected_errors=_number(row["ecc.errors.uncorrected.volatile.total"]),
                pcie_lanes=_number(row["pcie.link.width.current"]),
                max_pcie_lanes=_number(row["pcie.link.width.max"]),
                remap_pending=_switch(remap.get("remapped_rows.pending", "")),
                remap_failed=_switch(remap.get("remapped_rows.failure", "")),
                is_broken=not BROKEN_VALUES.isdisjoint({*row.values(), *remap.values()}),
            )
        )
    return gpus


def read_slowdowns(system: System) -> dict[int, int]:
    """GPU index -> bits of the reasons for currently reduced clocks. Raises the same errors as
    `read_gpus`."""
    rows = _query(system, "gpu", ("index", "clocks_event_reasons.active"))
    return {_parse_int(row["index"]): _parse_int(row["clocks_event_reasons.active"], base=16) for row in rows}


def judge_gpus(gpus: Sequence[Gpu], gpus_per_node: int) -> list[Finding]:
    """Check number, memory errors, PCIe links and modes of a node's GPUs."""
    return [
        _judge_count(gpus, gpus_per_node),
        _judge_memory_errors(gpus),
        _judge_links(gpus),
        _judge_modes(gpus),
    ]


def judge_slowdowns(bits_by_gpu: dict[int, int]) -> Finding:
    """Check that GPUs ran at full clocks; the bits were read under load."""
    check = THROTTLING
    slow = {gpu: bits for gpu, bits in bits_by_gpu.items() if any(bits & bit for bit in SLOWDOWN_BITS)}
    if not slow:
        return passed(check, f"none of {len(bits_by_gpu)} GPUs under load")
    reasons = (
        f"GPU {gpu}: {', '.join(text for bit, text in SLOWDOWN_BITS.items() if bits & bit)}"
        for gpu, bits in slow.items()
    )
    is_hardware = any(bits & HARDWARE_BITS for bits in slow.values())
    rule = "nothing but the power cap may reduce clocks"
    remedy = "drain the node and check its cooling and power supply"
    return (failed if is_hardware else warned)(check, "; ".join(reasons), rule, remedy)


def _judge_count(gpus: Sequence[Gpu], expected: int) -> Finding:
    check = COUNT
    kinds = Counter(gpu.name for gpu in gpus)
    found = " + ".join(f"{count} x {name}" for name, count in kinds.items()) or "0"
    # As many as configured, all working, all of one kind.
    if len(gpus) != expected:
        rule = f"cluster.gpus_per_node is {expected}"
        remedy = "check dmesg for Xid errors and drain the node, or correct the cluster file"
        return failed(check, found, rule, remedy)
    broken = [gpu.index for gpu in gpus if gpu.is_broken]
    if broken:
        rule = "each GPU must work"
        remedy = "reset the GPUs (nvidia-smi --gpu-reset) or reboot the node; check dmesg for Xid errors"
        return failed(check, f"{found}, GPUs {broken} are lost or require a reset", rule, remedy)
    if len(kinds) > 1:
        return failed(check, found, "GPUs of a node must be of one kind", "drain the node")
    return passed(check, found)


def _judge_memory_errors(gpus: Sequence[Gpu]) -> Finding:
    check = MEMORY_ERRORS
    # From worst to mildest: hardware to replace, errors that a reset fixes, ECC off, ECC not reported.
    exhausted = [gpu.index for gpu in gpus if gpu.remap_failed]
    if exhausted:
        return failed(
            check,
            f"GPUs {exhausted} have no spare rows left",
            "broken rows must be remapped",
            "replace the GPUs",
        )
    broken = {gpu.index: gpu.uncorrected_errors for gpu in gpus if gpu.uncorrected_errors}
    waiting = [gpu.index for gpu in gpus if gpu.remap_pending]
    if broken or waiting:
        found = f"uncorrected errors by GPU {broken}, rows to be remapped on GPUs {waiting}"
        rule = "memory must be free of errors when a job starts"
        return failed(check, found, rule, "reset the GPUs (nvidia-smi --gpu-reset) or reboot the node")
    off = [gpu.index for gpu in gpus if gpu.has_ecc is False]
    if off:
        rule = "without ECC, a flipped bit changes the training silently"
        return warned(check, f"ECC is off on GPUs {off}", rule, "nvidia-smi --ecc-config=1 and reboot")
    silent = [gpu.index for gpu in gpus if gpu.has_ecc is None or gpu.uncorrected_errors is None]
    if silent:
        return skipped(check, f"GPUs {silent} do not report ECC")
    return passed(check, "none, ECC on")


def _judge_links(gpus: Sequence[Gpu]) -> Finding:
    check = LANES
    known = [gpu for gpu in gpus if gpu.pcie_lanes is not None and gpu.max_pcie_lanes is not None]
    if len(known) < len(gpus):
        return skipped(check, "nvidia-smi does not report them")
    narrow = [
        f"GPU {gpu.index}: {gpu.pcie_lanes} of {gpu.max_pcie_lanes}"
        for gpu in known
        if gpu.pcie_lanes != gpu.max_pcie_lanes
    ]
    if narrow:
        rule = "all lanes must be up: offloading and RDMA share them"
        return failed(check, "; ".join(narrow), rule, "reseat or replace the GPU; drain the node")
    return passed(check, f"{sorted({gpu.pcie_lanes or 0 for gpu in known})} each")


def _judge_modes(gpus: Sequence[Gpu]) -> Finding:
    check = MODES
    split = [gpu.index for gpu in gpus if gpu.is_split]
    if split:
        rule = "a rank needs a whole GPU"
        return failed(check, f"MIG is on for GPUs {split}", rule, "nvidia-smi --multi-instance-gpu=0")
    drivers = sorted({gpu.driver for gpu in gpus})
    return passed(check, f"MIG off, driver {', '.join(drivers)}")


def _query(system: System, what: str, fields: Sequence[str]) -> list[dict[str, str]]:
    command = ["nvidia-smi", f"--query-{what}={','.join(fields)}", "--format=csv,noheader,nounits"]
    rows = []
    for cells in csv.reader(system.run(command).splitlines(), skipinitialspace=True):
        if len(cells) != len(fields):
            raise BrokenError(f"{' '.join(command)}: printed {cells!r}; expected {len(fields)} values")
        rows.append(dict(zip(fields, (cell.strip() for cell in cells), strict=True)))
    return rows


def _parse_int(text: str, base: int = 10) -> int:
    """A required integer."""
    try:
        return int(text, base)
    except ValueError as error:
        raise BrokenError(f"nvidia-smi printed {text!r} where a number was expected") from error


def _number(text: str) -> int | None:
    """An integer; None for "[N/A]", "[Not Supported]" and similar values."""
    return int(text) if re.fullmatch(r"\d+", text) else None


def _switch(text: str) -> bool | None:
    """On or off, in the spellings of different driver versions."""
    return {"enabled": True, "yes": True, "1": True, "disabled": False, "no": False, "0": False}.get(
        text.lower()
    )
