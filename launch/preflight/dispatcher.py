"""What the dispatcher of tokens to experts needs of a node: nothing over NCCL, NVSHMEM for DeepEP."""

import re
from dataclasses import dataclass

from launch.preflight.findings import Finding, failed, passed, skipped, warned
from launch.preflight.system import Build, System

DISPATCHER = "token dispatcher"
OVER_NCCL = ("alltoall",)
"""Dispatchers of megatron-core that only use torch's collectives; `flex` is DeepEP or HybridEP."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Shmem:
    """What NVSHMEM finds on a node."""

    has_gdrcopy: bool
    """Whether the device of gdrcopy is there."""
    maps_peers: bool | None
    """Whether the driver lets cards ring doorbells from GPUs (IBGDA); None if it does not show it."""


def read_shmem(system: System) -> Shmem:
    """Read the driver's settings."""
    params = system.read("proc/driver/nvidia/params")
    return Shmem(
        has_gdrcopy="gdrdrv" in system.names("dev"),
        maps_peers=None
        if params is None
        else bool(
            re.search(r"PeerMappingOverride=1", params) and re.search(r"EnableStreamMemOPs: 1", params)
        ),
    )


def judge_dispatcher(kind: str, shmem: Shmem, build: Build) -> Finding:
    """Check that the node can run a dispatcher, `moe_token_dispatcher_type` of megatron-core."""
    if kind in OVER_NCCL:
        # Here there is nothing to look for but NCCL itself.
        if not build.nccl:
            return skipped(DISPATCHER, f"{kind} goes over NCCL, which is no package of its own here")
        found = ", ".join(f"{name} {version}" for name, version in build.nccl.items())
        return passed(DISPATCHER, f"{kind} needs no NVSHMEM, only NCCL: {found}")
    missing = [
        name for name, version in (("deep_ep", build.deep_ep), ("NVSHMEM", build.nvshmem)) if not version
    ]
    if missing:
        found = f"no {' and no '.join(missing)}"
        return failed(
            DISPATCHER, found, f"{kind} needs them", "install nvidia-nvshmem and deep_ep in the image"
        )
    if not shmem.has_gdrcopy:
        rule = "NVSHMEM's proxy writes to GPU memory through it"
        return warned(
            DISPATCHER, "no /dev/gdrdrv", rule, "load gdrdrv, and pass /dev/gdrdrv into the container"
        )
    if shmem.maps_peers is False:
        rule = "GPUs must be able to ring a card's doorbell (IBGDA), otherwise a CPU thread does"
        remedy = (
            'options nvidia NVreg_EnableStreamMemOPs=1 NVreg_RegistryDwords="PeerMappingOverride=1;", reboot'
        )
        return warned(DISPATCHER, "the driver does not map peers", rule, remedy)
    return passed(DISPATCHER, f"{kind}: deep_ep {build.deep_ep}, NVSHMEM {build.nvshmem}")
