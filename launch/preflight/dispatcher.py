"""What the dispatcher of tokens to experts needs of a node, and pairs of versions that are known not to work.

Sources are in `KNOWN_BAD`, and next to each rule.
"""

import re
from collections.abc import Callable
from dataclasses import dataclass

from k25_train.config.schema import Config
from launch.preflight.findings import Finding, failed, passed, skipped, warned
from launch.preflight.peer_memory import MODULES
from launch.preflight.system import Build, System

DISPATCHER = "token dispatcher"
LIBRARIES = ("usr/lib/x86_64-linux-gnu", "usr/lib/aarch64-linux-gnu", "usr/lib64", "lib64")
"""Where distributions put the libraries of rdma-core."""
Version = tuple[int, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class Shmem:
    """What dispatchers find on a node."""

    has_gdrcopy: bool
    """Whether the device of gdrcopy is there."""
    maps_peers: bool | None
    """Whether the driver lets GPUs ring the cards' doorbells (IBGDA); None if it does not show it."""
    has_peermem: bool = True
    """Whether nvidia-peermem is loaded."""
    rdma_core: int | None = None
    """Version of rdma-core's libraries; None if they are not where distributions put them."""


def read_shmem(system: System) -> Shmem:
    """Read the driver's settings, kernel modules and libraries."""
    params = system.read("proc/driver/nvidia/params")
    verbs = [
        int(found[1])
        for folder in LIBRARIES
        for name in system.names(folder)
        if (found := re.fullmatch(r"libibverbs\.so\.1\.\d+\.(\d+)\.\d+", name))
    ]
    return Shmem(
        has_gdrcopy="gdrdrv" in system.names("dev"),
        maps_peers=None
        if params is None
        else bool(
            re.search(r"PeerMappingOverride=1", params) and re.search(r"EnableStreamMemOPs: 1", params)
        ),
        has_peermem=any(system.read(path) is not None for path in MODULES),
        rdma_core=max(verbs, default=None),
    )


def parts(version: str | None) -> Version:
    """2.30.4 -> (2, 30, 4); what follows the numbers does not count."""
    found = re.match(r"\d+(?:\.\d+)*", version or "")
    return tuple(map(int, found[0].split("."))) if found else ()


def nccl_of(build: Build) -> str | None:
    """The newest NCCL that is a package; None if it is part of torch."""
    return max(build.nccl.values(), key=parts, default=None)


@dataclass(frozen=True, slots=True, kw_only=True)
class Known:
    """A combination that does not work, and where that is reported."""

    dispatcher: str
    between_nodes: bool
    """Whether it works within a node."""
    is_so: Callable[[Build, Shmem], bool]
    found: Callable[[Build, Shmem], str]
    rule: str
    remedy: str


KNOWN_BAD = (
    Known(
        dispatcher="deepep",
        between_nodes=False,
        is_so=lambda build, _: parts(build.deep_ep) >= (2,),
        found=lambda build, _: f"deep_ep {build.deep_ep}",
        # megatron-core 0.19.2 imports EventOverlap from deep_ep.utils, which DeepEP 2.1.0 does not have; it
        # then takes DeepEP to be absent. torchtitan PR 3414, Megatron-LM PR 5153.
        rule="megatron-core 0.19.2 knows the interface of DeepEP 1 only",
        remedy="install deep_ep 1.2.1",
    ),
    Known(
        dispatcher="deepep",
        between_nodes=True,
        is_so=lambda build, _: () < parts(build.nvshmem) < (3, 3, 9),
        found=lambda build, _: f"NVSHMEM {build.nvshmem}",
        rule="DeepEP needs 3.3.9 or later, or an NVSHMEM with its patch (DeepEP, third-party/README.md)",
        remedy="install nvidia-nvshmem 3.4.5, with which torch 2.13 comes, and build deep_ep again",
    ),
    Known(
        dispatcher="deepep",
        between_nodes=True,
        is_so=lambda build, _: parts(build.nvshmem) >= (3, 5) and "+" not in (build.deep_ep or ""),
        found=lambda build, _: f"deep_ep {build.deep_ep} with NVSHMEM {build.nvshmem}",
        rule="queue pairs moved in NVSHMEM 3.5: exchanges between nodes hang (DeepEP issues 553, 707, 764)",
        remedy="use NVSHMEM 3.4.5, or a build of DeepEP with its PR 564",
    ),
    Known(
        dispatcher="hybridep",
        between_nodes=True,
        is_so=lambda _, shmem: shmem.rdma_core is not None and shmem.rdma_core < 60,
        found=lambda _, shmem: f"rdma-core {shmem.rdma_core}",
        rule="HybridEP needs rdma-core 60 or later (DeepEP, branch hybrid-ep, README_Hybrid-EP.md)",
        remedy="install rdma-core 60 in the image, and build deep_ep with HYBRID_EP_MULTINODE=1 again",
    ),
    Known(
        dispatcher="hybridep",
        between_nodes=True,
        is_so=lambda _, shmem: not shmem.has_peermem,
        found=lambda *_: "nvidia-peermem is not loaded",
        rule="HybridEP registers GPU memory by it alone, not by dma-buf, and ends otherwise (DeepEP PR 749)",
        remedy="modprobe nvidia-peermem, and load it at boot",
    ),
    Known(
        dispatcher="ncclep",
        between_nodes=False,
        is_so=lambda build, _: () < parts(nccl_of(build)) < (2, 30, 4),
        found=lambda build, _: f"NCCL {nccl_of(build)}",
        rule="NCCL EP needs 2.30.4 or later (Transformer Engine 2.20, common/ep/ep_backend.cpp)",
        remedy="use an image with NCCL 2.30.4 or later, or another parallelism.dispatcher",
    ),
)
"""What is refused, by dispatcher."""


def judge_dispatcher(config: Config, shmem: Shmem, build: Build) -> Finding:
    """Check that the node can run `parallelism.dispatcher`."""
    kind = config.parallelism.dispatcher.value
    between_nodes = config.parallelism.ep > config.cluster.gpus_per_node
    if kind == "alltoall":
        # Here there is nothing to look for but NCCL itself.
        if not build.nccl:
            return skipped(DISPATCHER, f"{kind} goes over NCCL, which is no package of its own here")
        found = ", ".join(f"{name} {version}" for name, version in build.nccl.items())
        return passed(DISPATCHER, f"{kind} needs no NVSHMEM, only NCCL: {found}")
    missing = [name for name, version in _needed(kind, build).items() if not version]
    if missing:
        remedy = f"install {' and '.join(missing)} in the image, or use parallelism.dispatcher=alltoall"
        return failed(DISPATCHER, f"no {' and no '.join(missing)}", f"{kind} needs them", remedy)
    for known in KNOWN_BAD:
        concerns = known.dispatcher == kind and (between_nodes or not known.between_nodes)
        if concerns and known.is_so(build, shmem):
            return failed(DISPATCHER, known.found(build, shmem), known.rule, known.remedy)
    if kind == "deepep" and between_nodes:
        return _judge_doorbells(shmem, build)
    versions = ", ".join(f"{name} {version}" for name, version in _needed(kind, build).items())
    return passed(DISPATCHER, f"{kind}: {versions}")


def _needed(kind: str, build: Build) -> dict[str, str | None]:
    """Packages of a dispatcher, with their versions."""
    if kind == "ncclep":
        return {"transformer_engine": build.transformer_engine}
    return {"deep_ep": build.deep_ep} | ({"NVSHMEM": build.nvshmem} if kind == "deepep" else {})


def _judge_doorbells(shmem: Shmem, build: Build) -> Finding:
    """How cards are told of work: by GPUs, or by a CPU thread through gdrcopy (DeepEP, docs/nvshmem.md)."""
    remedy = 'options nvidia NVreg_EnableStreamMemOPs=1 NVreg_RegistryDwords="PeerMappingOverride=1;", reboot'
    if shmem.maps_peers is False and not shmem.has_gdrcopy:
        rule = "GPUs must be able to ring a card's doorbell (IBGDA), or a CPU thread through gdrcopy"
        return failed(DISPATCHER, "the driver does not map peers, and no /dev/gdrdrv", rule, remedy)
    if not shmem.has_gdrcopy:
        rule = "NVSHMEM's proxy writes to GPU memory through it"
        return warned(
            DISPATCHER, "no /dev/gdrdrv", rule, "load gdrdrv, and pass /dev/gdrdrv into the container"
        )
    if shmem.maps_peers is False:
        rule = "GPUs should be able to ring a card's doorbell (IBGDA), otherwise a CPU thread does"
        return warned(DISPATCHER, "the driver does not map peers", rule, remedy)
    if shmem.rdma_core is not None and shmem.rdma_core < 60:
        rule = "with 50, dispatch between nodes of B200 timed out (Megatron-Bridge PR 3704)"
        return warned(DISPATCHER, f"rdma-core {shmem.rdma_core}", rule, "install rdma-core 60 in the image")
    return passed(DISPATCHER, f"deepep: deep_ep {build.deep_ep}, NVSHMEM {build.nvshmem}")
