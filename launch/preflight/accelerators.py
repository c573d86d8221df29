"""The GPUs of one node: everything that is read of them, and the verdicts that need no other node."""

from collections.abc import Mapping
from dataclasses import dataclass

from k25_train.config.cluster import ClusterConfig, Device
from launch.preflight.affinity import PATH_CHECKS, Paths, judge_paths, read_paths
from launch.preflight.drivers import DRIVER_CHECKS, Driver, judge_driver, read_driver
from launch.preflight.findings import Finding, failed, skipped
from launch.preflight.gpu_load import LOAD_CHECKS, GpuLoad, judge_load, read_load
from launch.preflight.gpu_memory import MEMORY_CHECKS, judge_memory
from launch.preflight.gpu_product import PRODUCT_CHECKS, judge_product, judge_settings
from launch.preflight.gpu_state import GpuState, read_states
from launch.preflight.gpus import GPU_CHECKS, Gpu, judge_gpus, read_gpus
from launch.preflight.near_cpus import NEAR_CPUS, judge_near_cpus, read_near_cpus
from launch.preflight.nvlink import (
    NVLINK_CHECKS,
    NvLinks,
    judge_fabric,
    judge_link_errors,
    judge_links,
    read_link_errors,
    read_links,
)
from launch.preflight.pci import PCI_CHECKS, Pci, judge_pci, read_pci, read_pci_errors
from launch.preflight.system import Missing, System, try_to_read

NOTHING_MEASURED = Missing(reason="nothing was measured")
STATE_CHECKS = (*MEMORY_CHECKS, *PRODUCT_CHECKS[2:])
REST = (
    *GPU_CHECKS[1:], *PRODUCT_CHECKS[:2], *STATE_CHECKS, *DRIVER_CHECKS, *PATH_CHECKS, NEAR_CPUS,
    *NVLINK_CHECKS, *PCI_CHECKS, *LOAD_CHECKS,
)  # fmt: skip
"""All checks of GPUs but that of their number."""
LinkErrors = dict[str, dict[str, int]]
"""Link or device -> kind of error -> count."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Measured:
    """What was read again after the measurements, to see what has grown."""

    states: list[GpuState] | Missing
    link_errors: LinkErrors | Missing
    pci_errors: LinkErrors


@dataclass(slots=True, kw_only=True)
class Accelerators:
    """What was read of the GPUs; what they do under load and counters after it are added later."""

    gpus: list[Gpu] | Missing
    states: list[GpuState] | Missing
    driver: Driver
    paths: Paths | Missing
    far_cpus: Mapping[int, str] | Missing
    """GPU -> what keeps its rank from running near it."""
    links: NvLinks | Missing
    link_errors: LinkErrors | Missing
    pci: Pci
    up_s: float | None
    """Time since the node was started."""
    load: list[GpuLoad] | Missing = NOTHING_MEASURED
    after: Measured | Missing = NOTHING_MEASURED


def read_accelerators(system: System, up_s: float | None) -> Accelerators:
    """Read everything that can be read at rest."""
    gpus = try_to_read(lambda: read_gpus(system))
    return Accelerators(
        gpus=gpus,
        states=try_to_read(lambda: read_states(system)),
        driver=read_driver(system),
        paths=try_to_read(lambda: read_paths(system)),
        far_cpus=gpus if isinstance(gpus, Missing) else try_to_read(read_near_cpus, system, gpus),
        links=try_to_read(lambda: read_links(system)),
        link_errors=try_to_read(lambda: read_link_errors(system)),
        pci=read_pci(system, [] if isinstance(gpus, Missing) else [gpu.bus_id for gpu in gpus]),
        up_s=up_s,
    )


def read_accelerators_under_load(system: System, own: Accelerators) -> None:
    """Add clocks and links; to be called while the GPUs compute."""
    own.load = try_to_read(lambda: read_load(system))


def read_accelerators_after_load(system: System, own: Accelerators) -> None:
    """Add the counters after the measurements."""
    own.after = Measured(
        states=try_to_read(lambda: read_states(system)),
        link_errors=try_to_read(lambda: read_link_errors(system)),
        pci_errors=read_pci_errors(system, list(own.pci.errors)),
    )


def judge_accelerators(own: Accelerators, cluster: ClusterConfig, cards: list[str]) -> list[Finding]:
    """Every finding on the node's GPUs that needs no other node; `cards` are the RDMA devices in use."""
    if cluster.device is Device.cpu:
        reason = f"cluster {cluster.name} computes on CPUs (cluster.device is cpu)"
        return [skipped(check, reason) for check in (GPU_CHECKS[0], *REST)]
    # 1. Without nvidia-smi, one check fails and the others are skipped.
    if isinstance(own.gpus, Missing):
        rule = f"cluster.gpus_per_node is {cluster.gpus_per_node}"
        remedy = "install or repair the driver, or start the container with GPUs; drain the node"
        number = failed(GPU_CHECKS[0], own.gpus.reason, rule, remedy)
        return [number, *(skipped(check, own.gpus.reason) for check in REST)]
    # 2. Number, product, driver, settings.
    findings = judge_gpus(own.gpus, cluster.gpus_per_node) + judge_product(own.gpus, cluster)
    findings += judge_driver(own.driver, [gpu.driver for gpu in own.gpus])
    findings += _judge_states(own, own.states, cluster)
    # 3. What connects them.
    if isinstance(own.paths, Missing):
        findings += [skipped(check, own.paths.reason) for check in PATH_CHECKS]
    else:
        findings += judge_paths(own.paths, len(own.gpus), cards)
    if isinstance(own.far_cpus, Missing):
        findings.append(skipped(NEAR_CPUS, own.far_cpus.reason))
    else:
        findings.append(judge_near_cpus(own.far_cpus))
    findings += _judge_links(own, len(own.gpus))
    after = None if isinstance(own.after, Missing) else own.after
    findings += judge_pci(own.pci, None if after is None else after.pci_errors)
    # 4. Under load.
    if isinstance(own.load, Missing):
        return findings + [skipped(check, own.load.reason) for check in LOAD_CHECKS]
    return findings + judge_load(own.load)


def _judge_states(
    own: Accelerators, states: list[GpuState] | Missing, cluster: ClusterConfig
) -> list[Finding]:
    if isinstance(states, Missing):
        return [skipped(check, states.reason) for check in STATE_CHECKS]
    after = None if isinstance(own.after, Missing) else own.after.states
    later = None if isinstance(after, Missing) else after
    return judge_memory(states, later, own.up_s) + judge_settings(states, cluster)


def _judge_links(own: Accelerators, num_gpus: int) -> list[Finding]:
    links, errors, fabric = NVLINK_CHECKS
    after = None if isinstance(own.after, Missing) else own.after.link_errors
    return [
        skipped(links, own.links.reason)
        if isinstance(own.links, Missing)
        else judge_links(own.links, num_gpus),
        skipped(errors, own.link_errors.reason)
        if isinstance(own.link_errors, Missing)
        else judge_link_errors(own.link_errors, None if isinstance(after, Missing) else after),
        skipped(fabric, own.states.reason) if isinstance(own.states, Missing) else judge_fabric(own.states),
    ]
