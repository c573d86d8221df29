"""GPUDirect RDMA: whether cards can read and write the memory of GPUs, by a kernel module or by dma-buf.

What NCCL really uses is read from its own log (`transports`); this says beforehand what is missing.
"""

import re
from dataclasses import dataclass

from launch.preflight.findings import Finding, failed, passed, skipped
from launch.preflight.system import System

GPUDIRECT = "GPUDirect RDMA"
MODULES = (
    "sys/kernel/mm/memory_peers/nv_mem/version",
    "sys/kernel/mm/memory_peers/nv_mem_nc/version",
    "sys/kernel/mm/memory_peers/nvidia-peermem/version",
    "sys/module/nvidia_peermem/version",
)
"""Files by which NCCL recognises the module (ncclIbGdrSupport); names differ between its versions."""
DRIVER = "proc/driver/nvidia/version"
DMA_BUF_KERNEL = (5, 12)
"""First kernel whose RDMA registers dma-bufs; from the driver, only the open kernel modules offer them."""


@dataclass(frozen=True, slots=True, kw_only=True)
class PeerMemory:
    """What the kernel offers."""

    has_module: bool
    """Whether nvidia-peermem, or its predecessor nv_peer_mem, is loaded."""
    driver: str
    """First line of the driver's own version file; empty if there is none."""
    kernel: str

    @property
    def has_dma_buf(self) -> bool:
        """Whether driver and kernel know dma-buf."""
        version = re.match(r"(\d+)\.(\d+)", self.kernel)
        is_new = version is not None and (int(version[1]), int(version[2])) >= DMA_BUF_KERNEL
        return is_new and "Open Kernel Module" in self.driver


def read_peer_memory(system: System) -> PeerMemory:
    """Read modules and versions."""
    return PeerMemory(
        has_module=any(system.read(path) is not None for path in MODULES),
        driver=(system.read(DRIVER) or "").partition("\n")[0],
        kernel=system.read("proc/sys/kernel/osrelease") or "",
    )


def judge_peer_memory(memory: PeerMemory) -> Finding:
    """Check for one of the two ways."""
    check = GPUDIRECT
    if memory.has_module:
        return passed(check, "nvidia-peermem is loaded")
    if not memory.driver:
        return skipped(check, "no nvidia-peermem, and /proc/driver/nvidia/version is not shown")
    if memory.has_dma_buf:
        return passed(check, "dma-buf, by the driver's open kernel modules")
    found = f"no nvidia-peermem, and no dma-buf with kernel {memory.kernel} and {memory.driver!r}"
    rule = "without, NCCL copies through the host's memory, at a fraction of the speed"
    remedy = "modprobe nvidia-peermem, and load it at boot; or install the driver's open kernel modules"
    return failed(check, found, rule, remedy)
