"""GPUs against the cluster file: product, memory, power cap; and settings that jobs rely on."""

import re
from collections.abc import Sequence

from k25_train.config.cluster import ClusterConfig
from launch.preflight.findings import Finding, failed, passed, skipped, warned
from launch.preflight.gpu_state import GpuState
from launch.preflight.gpus import Gpu

PRODUCT, MEMORY, POWER, SETTINGS, SLOT = PRODUCT_CHECKS = (
    "GPU product",
    "GPU memory size",
    "GPU power cap",
    "GPU settings",
    "GPU slot",
)
LARGER = 1.2
"""How many times the memory of the cluster file a GPU may have, before the file looks wrong. Our choice: what
nvidia-smi reports is up to 7% more than a data sheet's round number."""


def judge_product(gpus: Sequence[Gpu], cluster: ClusterConfig) -> list[Finding]:
    """Check that the GPUs are those of the cluster file."""
    return [_judge_name(gpus, cluster), _judge_size(gpus, cluster)]


def judge_settings(states: Sequence[GpuState], cluster: ClusterConfig) -> list[Finding]:
    """Check power cap, clocks, modes, and what the slots allow."""
    return [_judge_power(states, cluster), _judge_settings(states), _judge_slots(states)]


def _judge_name(gpus: Sequence[Gpu], cluster: ClusterConfig) -> Finding:
    check = PRODUCT
    if cluster.gpu is None:
        return skipped(check, "the cluster file does not say which (cluster.gpu is null)")
    if len({gpu.name for gpu in gpus}) != 1:
        return skipped(check, "there are several" if gpus else "no GPU")
    wanted = _words(cluster.gpu.model)
    others = sorted({gpu.name for gpu in gpus if not wanted <= _words(gpu.name)})
    if others:
        rule = f"cluster.gpu.model is {cluster.gpu.model}"
        remedy = "leave the node out of the partition, or correct the cluster file and with it the plan"
        return failed(check, ", ".join(others), rule, remedy)
    return passed(check, ", ".join(sorted({gpu.name for gpu in gpus})))


def _words(name: str) -> set[str]:
    """Of a product's name: `NVIDIA H100 80GB HBM3`, but `NVIDIA A100-SXM4-80GB`."""
    return set(re.findall(r"[a-z0-9]+", name.lower()))


def _judge_size(gpus: Sequence[Gpu], cluster: ClusterConfig) -> Finding:
    check = MEMORY
    # A GPU that is lost reports 0; it fails for that.
    sizes = {gpu.index: gpu.memory_mib * 2**20 / 1e9 for gpu in gpus if gpu.memory_mib}
    if len(sizes) < len(gpus) or not sizes or cluster.gpu_memory_gb is None:
        return skipped(check, "nvidia-smi does not report it for all GPUs")
    rule = f"cluster.rates.memory_gb is {cluster.gpu_memory_gb:g}"
    small = [f"GPU {gpu}: {size:.1f} GB" for gpu, size in sizes.items() if size < cluster.gpu_memory_gb]
    if small:
        remedy = "drain the node, or correct the cluster file: the plan of memory follows from it"
        return failed(check, "; ".join(small), rule, remedy)
    if min(sizes.values()) > LARGER * cluster.gpu_memory_gb:
        found = f"{min(sizes.values()):.1f} GB each"
        return warned(check, found, rule, "correct the cluster file: the plan leaves memory unused")
    return passed(check, f"{min(sizes.values()):.1f} GB each")


def _judge_power(states: Sequence[GpuState], cluster: ClusterConfig) -> Finding:
    check = POWER
    limits = [state.power_limit_w for state in states]
    if not limits or None in limits:
        return skipped(check, "nvidia-smi does not report it for all GPUs")
    wanted = None if cluster.gpu is None else cluster.gpu.power_limit_w
    low = []
    for number, state in enumerate(states):
        least = wanted if wanted is not None else state.default_power_limit_w
        if least is not None and (state.power_limit_w or 0) < least:
            low.append(f"GPU {number}: {state.power_limit_w:g} of {least:g} W")
    if low:
        rule = "cluster.gpu.power_limit_w" if wanted is not None else "the GPU's default"
        remedy = "nvidia-smi --power-limit=WATTS, and in the node's start; or correct the cluster file"
        return warned(check, "; ".join(low), f"{rule}: the slowest GPU sets the pace of all", remedy)
    return passed(check, f"{', '.join(sorted({f'{limit:g}' for limit in limits if limit is not None}))} W")


def _judge_settings(states: Sequence[GpuState]) -> Finding:
    check = SETTINGS
    # 1. What no rank could start on.
    shut = [number for number, state in enumerate(states) if state.compute_mode == "Prohibited"]
    if shut:
        rule = "ranks must be allowed to compute"
        return failed(
            check, f"compute mode of GPUs {shut} is Prohibited", rule, "nvidia-smi --compute-mode=DEFAULT"
        )
    # 2. What makes GPUs slow.
    lowered = [
        f"GPU {number}: {state.set_clock_mhz} of {state.default_clock_mhz} MHz"
        for number, state in enumerate(states)
        if state.set_clock_mhz and state.default_clock_mhz and state.set_clock_mhz < state.default_clock_mhz
    ]
    if lowered:
        rule = "application clocks must not be below the default"
        return warned(check, "; ".join(lowered), rule, "nvidia-smi --reset-applications-clocks")
    off = [number for number, state in enumerate(states) if state.persistence is False]
    if off:
        rule = "without persistence mode each process starts the driver again, which forgets its settings"
        return warned(
            check, f"persistence mode is off on GPUs {off}", rule, "start nvidia-persistenced on the node"
        )
    if not states or any(state.persistence is None or state.compute_mode is None for state in states):
        return skipped(check, "nvidia-smi does not report persistence and compute mode of all GPUs")
    modes = ", ".join(sorted({state.compute_mode or "" for state in states}))
    return passed(check, f"persistence on, compute mode {modes}")


def _judge_slots(states: Sequence[GpuState]) -> Finding:
    check = SLOT
    known = [(state.max_pcie_generation, state.own_pcie_generation) for state in states]
    if not known or any(slot is None or own is None for slot, own in known):
        return skipped(check, "nvidia-smi does not report what slots and GPUs are capable of")
    slow = [
        f"GPU {number}: generation {slot}, the GPU has {own}"
        for number, (slot, own) in enumerate(known)
        if slot is not None and own is not None and slot < own
    ]
    if slow:
        rule = "a slot should not be slower than its GPU"
        return warned(check, "; ".join(slow), rule, "check the BIOS's setting of the slot (link speed: auto)")
    return passed(
        check, f"PCIe generation {', '.join(sorted({str(slot) for slot, _ in known}))}, as the GPUs"
    )
