"""GPUs while they compute: reduced clocks, and the PCIe link.

At rest a GPU may lower its clocks and the speed of its link to save power, so neither says anything then.
"""

from collections.abc import Mapping
from dataclasses import dataclass

from launch.preflight.findings import Finding, failed, passed, skipped, warned
from launch.preflight.gpu_query import query, required_int, whole
from launch.preflight.system import BrokenError, System

THROTTLING, LINK, CLOCKS = LOAD_CHECKS = ("GPU throttling", "GPU PCIe link", "GPU clocks")
FIELDS = (
    "index",
    "utilization.gpu",
    "clocks.current.sm",
    "clocks.max.sm",
    "pcie.link.gen.current",
    "pcie.link.gen.max",
    "pcie.link.width.current",
    "pcie.link.width.max",
)
"""Fields queried from nvidia-smi (`nvidia-smi --help-query-gpu`)."""
REASONS = ("clocks_event_reasons.active", "clocks_throttle_reasons.active")
"""Field of the reasons for reduced clocks, and its name in drivers before 535."""
BUSY_PERCENT = 50
"""Utilization from which a GPU is not at rest. Our choice: one that computes matrix products has 100%."""
CLOCK_SHARE = 0.5
"""Share of the highest clock that a GPU should keep under load. At its power cap a Hopper GPU that multiplies
matrices runs at 60 to 90% of it. Our choice."""

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
class GpuLoad:
    """One GPU while the ranks compute; None for values that it does not report."""

    index: int
    slowdown_bits: int
    utilization_percent: int | None
    clock_mhz: int | None
    max_clock_mhz: int | None
    generation: int | None
    """Of its PCIe link."""
    max_generation: int | None
    """Of the GPU in its slot."""
    lanes: int | None
    max_lanes: int | None

    @property
    def is_busy(self) -> bool:
        """Whether it computed when it was read: without torchrun there is a rank on one GPU only."""
        return self.utilization_percent is None or self.utilization_percent >= BUSY_PERCENT


def read_load(system: System) -> list[GpuLoad]:
    """The GPUs in the order of their indices; to be called while they compute.

    Raises:
        AbsentError: nvidia-smi is not installed.
        BrokenError: nvidia-smi fails or prints something unexpected.
    """
    name = REASONS[0]
    try:
        rows = query(system, "gpu", (*FIELDS, name))
    except BrokenError as error:
        if name not in str(error) or "not a valid field" not in str(error):
            raise
        name = REASONS[1]
        rows = query(system, "gpu", (*FIELDS, name))
    return [
        GpuLoad(
            index=required_int(row["index"]),
            slowdown_bits=required_int(row[name], base=16),
            utilization_percent=whole(row["utilization.gpu"]),
            clock_mhz=whole(row["clocks.current.sm"]),
            max_clock_mhz=whole(row["clocks.max.sm"]),
            generation=whole(row["pcie.link.gen.current"]),
            max_generation=whole(row["pcie.link.gen.max"]),
            lanes=whole(row["pcie.link.width.current"]),
            max_lanes=whole(row["pcie.link.width.max"]),
        )
        for row in rows
    ]


def judge_load(gpus: list[GpuLoad]) -> list[Finding]:
    """Check clocks and PCIe links of the GPUs that computed."""
    busy = [gpu for gpu in gpus if gpu.is_busy]
    idle = [gpu.index for gpu in gpus if not gpu.is_busy]
    if not busy:
        reason = f"GPUs {idle} did not compute when they were read" if idle else "no GPU was read"
        return [skipped(check, reason) for check in LOAD_CHECKS]
    rest = f"; GPUs {idle} were at rest: not checked" if idle else ""
    return [
        _judge_slowdowns({gpu.index: gpu.slowdown_bits for gpu in busy}, rest),
        _judge_links(busy, rest),
        _judge_clocks(busy, rest),
    ]


def _judge_slowdowns(bits_by_gpu: Mapping[int, int], rest: str) -> Finding:
    check = THROTTLING
    slow = {gpu: bits for gpu, bits in bits_by_gpu.items() if any(bits & bit for bit in SLOWDOWN_BITS)}
    if not slow:
        return passed(check, f"none of {len(bits_by_gpu)} GPUs under load{rest}")
    reasons = (
        f"GPU {gpu}: {', '.join(text for bit, text in SLOWDOWN_BITS.items() if bits & bit)}"
        for gpu, bits in slow.items()
    )
    is_hardware = any(bits & HARDWARE_BITS for bits in slow.values())
    rule = "nothing but the power cap may reduce clocks"
    remedy = "drain the node and check its cooling and power supply"
    return (failed if is_hardware else warned)(check, "; ".join(reasons), rule, remedy)


def _judge_links(gpus: list[GpuLoad], rest: str) -> Finding:
    check = LINK
    faults = []
    for gpu in gpus:
        for unit, now, most in (
            ("generation", gpu.generation, gpu.max_generation),
            ("lanes", gpu.lanes, gpu.max_lanes),
        ):
            if now is None or most is None:
                return skipped(check, f"nvidia-smi does not report the {unit} of GPU {gpu.index}")
            if now < most:
                faults.append(f"GPU {gpu.index}: {unit} {now} of {most}")
    if faults:
        rule = "under load each link must run at full speed: offloading and RDMA share it"
        remedy = "reseat or replace the GPU, check the BIOS's setting of its slot; drain the node"
        return failed(check, "; ".join(faults), rule, remedy)
    links = sorted({f"generation {gpu.generation} x{gpu.lanes}" for gpu in gpus})
    return passed(check, f"{', '.join(links)} under load{rest}")


def _judge_clocks(gpus: list[GpuLoad], rest: str) -> Finding:
    check = CLOCKS
    known = [(gpu, gpu.clock_mhz or 0, gpu.max_clock_mhz or 0) for gpu in gpus]
    if any(not now or not most for _, now, most in known):
        return skipped(check, "nvidia-smi does not report the clocks of all GPUs")
    slow = [f"GPU {gpu.index}: {now} of {most} MHz" for gpu, now, most in known if now < CLOCK_SHARE * most]
    if slow:
        rule = f"under load a GPU should keep {CLOCK_SHARE:.0%} of its highest clock"
        remedy = "nvidia-smi --reset-gpu-clocks and --reset-memory-clocks; check its power cap and cooling"
        return warned(check, "; ".join(slow), rule, remedy)
    clocks = sorted(now for _, now, _ in known)
    return passed(
        check, f"{' to '.join(dict.fromkeys(map(str, (clocks[0], clocks[-1]))))} MHz under load{rest}"
    )
