"""GPUs of a node: how many, whether they work, and uncorrected memory errors."""

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

from launch.preflight.findings import Finding, failed, passed, skipped, warned
from launch.preflight.gpu_query import query, required_int, switch, whole
from launch.preflight.system import System

FIELDS = (
    "index",
    "name",
    "driver_version",
    "pci.bus_id",
    "memory.total",
    "mig.mode.current",
    "ecc.mode.current",
    "ecc.errors.uncorrected.volatile.total",
)
"""Fields queried from nvidia-smi (`nvidia-smi --help-query-gpu`)."""
REMAP_FIELDS = ("gpu_bus_id", "remapped_rows.pending", "remapped_rows.failure")
"""Fields queried on remapped rows (`nvidia-smi --help-query-remapped-rows`)."""
BROKEN_VALUES = {"[GPU requires reset]", "[GPU is lost]"}
"""Values that replace unreadable fields of a GPU that no longer works; its name remains readable."""

COUNT, MEMORY_ERRORS, MODES = GPU_CHECKS = ("GPU count", "GPU memory errors", "GPU modes")


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
    rows = query(system, "gpu", FIELDS)
    remaps = {row["gpu_bus_id"]: row for row in query(system, "remapped-rows", REMAP_FIELDS)}
    gpus = []
    for row in rows:
        remap = remaps.get(row["pci.bus_id"], {})
        gpus.append(
            Gpu(
                index=required_int(row["index"]),
                name=row["name"],
                driver=row["driver_version"],
                bus_id=row["pci.bus_id"],
                memory_mib=whole(row["memory.total"]),
                is_split=switch(row["mig.mode.current"]),
                has_ecc=switch(row["ecc.mode.current"]),
                uncorrected_errors=whole(row["ecc.errors.uncorrected.volatile.total"]),
                remap_pending=switch(remap.get("remapped_rows.pending", "")),
                remap_failed=switch(remap.get("remapped_rows.failure", "")),
                is_broken=not BROKEN_VALUES.isdisjoint({*row.values(), *remap.values()}),
            )
        )
    return gpus


def judge_gpus(gpus: Sequence[Gpu], gpus_per_node: int) -> list[Finding]:
    """Check number, memory errors and modes of a node's GPUs."""
    return [_judge_count(gpus, gpus_per_node), _judge_memory_errors(gpus), _judge_modes(gpus)]


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
    if silent or not gpus:
        return skipped(check, f"GPUs {silent} do not report ECC")
    silent = [gpu.index for gpu in gpus if gpu.remap_pending is None or gpu.remap_failed is None]
    if silent:
        return skipped(check, f"GPUs {silent} do not report remapped rows")
    return passed(check, "none, ECC on")


def _judge_modes(gpus: Sequence[Gpu]) -> Finding:
    check = MODES
    split = [gpu.index for gpu in gpus if gpu.is_split]
    if split:
        rule = "a rank needs a whole GPU"
        return failed(check, f"MIG is on for GPUs {split}", rule, "nvidia-smi --multi-instance-gpu=0")
    silent = [gpu.index for gpu in gpus if gpu.is_split is None]
    if silent or not gpus:
        return skipped(check, f"GPUs {silent} do not report MIG")
    return passed(check, "MIG off")
