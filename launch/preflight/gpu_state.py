"""What `nvidia-smi -q` says of each GPU: settings, memory errors, and its place in the NVLink fabric.

Its text is read rather than fields asked for: a field that a driver does not know fails a whole query, a line
that it does not print is just missing. Sections and lines are those of drivers 525 to 580.
"""

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass

from launch.preflight.gpu_query import number, switch, whole
from launch.preflight.system import BrokenError, System

HEADING = re.compile(r"GPU ([0-9A-Fa-f]{4,8}:[0-9A-Fa-f]{2}:[0-9A-Fa-f]{2}\.\d)\s*")
UNKNOWN = re.compile(r"\[?(N/A|Not Supported|Not Found|Unknown Error|.*has been deprecated|None)?\]?")
"""Values that say nothing, apart from numbers."""
SOUND_HEALTH = {"Full", "False", "No", "Healthy", "N/A", "Not Supported", "None", "Disabled"}
"""Values of the lines in a fabric's section Health that are no fault."""


@dataclass(frozen=True, slots=True, kw_only=True)
class GpuState:
    """One GPU; None for what it does not report."""

    bus_id: str
    persistence: bool | None
    compute_mode: str | None
    recovery: str | None
    """What the driver wants done with it, e.g. `None` or `Reset`; from the line `GPU Recovery Action`, or of
    older drivers from the section `GPU Reset Status`."""
    memory_used_mib: int | None
    power_limit_w: float | None
    default_power_limit_w: float | None
    max_pcie_generation: int | None
    """Of the GPU in its slot."""
    own_pcie_generation: int | None
    """Of the GPU itself."""
    set_clock_mhz: int | None
    """Clock that applications may ask for at most."""
    default_clock_mhz: int | None
    max_clock_mhz: int | None
    """Of the streaming multiprocessors."""
    corrected_errors: int | None
    """Memory errors since the driver was loaded that ECC corrected."""
    is_worn: bool | None
    """Whether on-chip memory has had more errors than the maker accepts, or memory is beyond repair."""
    repair_pending: bool | None
    """Whether a part of the GPU is to be replaced by a spare one at the next reset."""
    banks_without_spares: int | None
    banks_with_few_spares: int | None
    fabric_state: str | None
    """`Completed` once the GPU has joined the NVLink fabric."""
    fabric_status: str | None
    fabric_faults: tuple[str, ...]
    """Lines of the fabric's health that are no good news."""


def read_states(system: System) -> list[GpuState]:
    """The GPUs in the order of their indices.

    Raises:
        AbsentError: nvidia-smi is not installed.
        BrokenError: it fails, or prints no GPU.
    """
    found = [_state(bus_id, values) for bus_id, values in _gpus(system.run(["nvidia-smi", "-q"]))]
    if not found:
        raise BrokenError("nvidia-smi -q: no GPU in its output")
    return found


def read_cuda_version(system: System) -> str | None:
    """Highest CUDA version that the driver supports, as `nvidia-smi -q` has it. Raises as `read_states`."""
    found = re.search(r"^CUDA Version\s*:\s*(\d+\.\d+)", system.run(["nvidia-smi", "-q"]), re.MULTILINE)
    return found[1] if found else None


def _gpus(text: str) -> Iterator[tuple[str, dict[str, str]]]:
    """Bus address and values, by the path of their headings: `Remapped Rows/Pending` -> `No`."""
    parts = re.split(f"^{HEADING.pattern}$", text, flags=re.MULTILINE)
    for bus_id, block in zip(parts[1::2], parts[2::2], strict=True):
        values: dict[str, str] = {}
        path: list[tuple[int, str]] = []
        for line in block.splitlines():
            name, colon, value = (part.strip() for part in line.partition(" : "))
            indent = len(line) - len(line.lstrip())
            if not name:
                continue
            path = [(depth, heading) for depth, heading in path if depth < indent]
            full = "/".join([*(heading for _, heading in path), name])
            if colon:
                values.setdefault(full, value)
            # A line with a value may have others below it.
            path.append((indent, name))
        yield bus_id, values


def _state(bus_id: str, values: Mapping[str, str]) -> GpuState:
    def text(*names: str) -> str | None:
        known = (values[name] for name in names if name in values and not UNKNOWN.fullmatch(values[name]))
        return next(known, None)

    def one(*names: str) -> str:
        return text(*names) or ""

    rows, errors, repair = "Remapped Rows/Bank Remap Availability Histogram", "ECC Errors", "ECC Errors"
    link, readings = "PCI/GPU Link Info/PCIe Generation", ("GPU Power Readings", "Power Readings")
    corrected = [
        whole(value)
        for name, value in values.items()
        if re.fullmatch(r"ECC Errors/Volatile/\w+ Correctable", name)
    ]
    return GpuState(
        bus_id=bus_id,
        persistence=switch(one("Persistence Mode")),
        compute_mode=text("Compute Mode"),
        recovery=_recovery(values),
        memory_used_mib=whole(one("FB Memory Usage/Used")),
        power_limit_w=number(one(*(f"{part}/Current Power Limit" for part in readings), *_OLD_LIMITS)),
        default_power_limit_w=number(one(*(f"{part}/Default Power Limit" for part in readings))),
        max_pcie_generation=whole(one(f"{link}/Max")),
        own_pcie_generation=whole(one(f"{link}/Device Max")),
        set_clock_mhz=whole(one("Applications Clocks/Graphics")),
        default_clock_mhz=whole(one("Default Applications Clocks/Graphics")),
        max_clock_mhz=whole(one("Max Clocks/SM")),
        corrected_errors=sum(count for count in corrected if count is not None)
        if any(count is not None for count in corrected)
        else None,
        is_worn=_any(values, f"{errors}/Aggregate/SRAM Threshold Exceeded", f"{repair}/Unrepairable Memory"),
        repair_pending=_any(values, f"{repair}/Channel Repair Pending", f"{repair}/TPC Repair Pending"),
        banks_without_spares=whole(one(f"{rows}/None")),
        banks_with_few_spares=whole(one(f"{rows}/Low")),
        fabric_state=text("Fabric/State"),
        fabric_status=text("Fabric/Status"),
        fabric_faults=tuple(
            f"{name.rpartition('/')[2]}: {value}"
            for name, value in values.items()
            if name.startswith("Fabric/Health/") and value not in SOUND_HEALTH
        ),
    )


_OLD_LIMITS = ("GPU Power Readings/Power Limit", "Power Readings/Power Limit")


def _recovery(values: Mapping[str, str]) -> str | None:
    if action := values.get("GPU Recovery Action", "").strip("[]"):
        return None if action in ("N/A", "Not Supported") else action
    status = {
        "Reset": values.get("GPU Reset Status/Reset Required", ""),
        "Drain and Reset": values.get("GPU Reset Status/Drain and Reset Recommended", ""),
    }
    wanted = next((action for action, value in status.items() if switch(value)), None)
    return wanted or ("None" if switch(status["Reset"]) is False else None)


def _any(values: Mapping[str, str], *names: str) -> bool | None:
    """Whether one of the lines says yes; None if there is none of them."""
    known = [answer for name in names if (answer := switch(values.get(name, ""))) is not None]
    return any(known) if known else None
