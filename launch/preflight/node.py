"""One node: everything that is read of it, in one record, and the verdicts that need no other node."""

import hashlib
import platform
from collections.abc import Callable
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

from k25_train.config.cluster import Device, FabricConfig
from k25_train.config.schema import Config
from launch.fabric import environment
from launch.preflight.affinity import PATH_CHECKS, Paths, judge_paths, read_paths
from launch.preflight.environment import Surroundings, judge_surroundings, read_surroundings
from launch.preflight.findings import Finding, failed, skipped
from launch.preflight.gpus import (
    GPU_CHECKS,
    THROTTLING,
    Gpu,
    judge_gpus,
    judge_slowdowns,
    read_gpus,
    read_slowdowns,
)
from launch.preflight.hcas import HCA_CHECKS, Hca, judge_hcas, read_hcas
from launch.preflight.host import ACCESS_CHECKS, Host, judge_host, judge_network_access, read_host
from launch.preflight.lossless import (
    COUNTERS,
    TRAFFIC_CLASS,
    Priorities,
    judge_growth,
    judge_traffic_class,
    read_counters,
    read_priorities,
)
from launch.preflight.machine import AbsentError, BrokenError, Machine

CODE = Path(__file__).resolve().parents[2]
PACKAGES = ("torch", "megatron-core", "emerging-optimizers", "transformer-engine", "nvidia-nccl-cu13")
"""Distributions that must be of one version everywhere."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Missing:
    """Why something could not be read."""

    reason: str


Counters = dict[str, dict[str, int]]
"""Card -> name of a counter -> its count."""


@dataclass(slots=True, kw_only=True)
class Node:
    """What was read of a node; the counters and clocks under load are added after the measurements."""

    name: str
    host: Host
    surroundings: Surroundings
    gpus: list[Gpu] | Missing
    paths: Paths | Missing
    hcas: list[Hca]
    priorities: dict[str, Priorities | str]
    """Card, with the interface where it has several -> its priorities, or why they are unknown."""
    versions: dict[str, str]
    counters: Counters
    """Before the measurements."""
    counters_after: Counters | Missing = Missing(reason="nothing was sent")
    """After them."""
    slowdowns: dict[int, int] | Missing = Missing(reason="nothing was measured")
    """GPU -> bits of the reasons for lowered clocks, read while the GPUs computed."""


def read_node(machine: Machine, name: str, config: Config) -> Node:
    """Everything that can be read at rest."""
    hcas = read_hcas(machine)
    used = cards_in_use(hcas, config.cluster.fabric)
    gpus = _attempt(lambda: read_gpus(machine))
    return Node(
        name=name,
        host=read_host(machine, Path(config.run.dir).absolute()),
        surroundings=read_surroundings(machine),
        gpus=gpus,
        paths=_attempt(lambda: read_paths(machine)),
        hcas=hcas,
        priorities={
            f"{hca.name} {name}" if len(hca.interfaces) > 1 else hca.name: _priorities(machine, name)
            for hca in used
            for name in hca.interfaces
        },
        versions=read_versions(machine, gpus, used),
        counters=_counters(machine, used),
    )


def read_after_load(machine: Machine, node: Node, config: Config) -> None:
    """Add what has changed through the measurements."""
    node.counters_after = _counters(machine, cards_in_use(node.hcas, config.cluster.fabric))


def read_under_load(machine: Machine, node: Node) -> None:
    """Add why clocks are lowered; to be called while the GPUs compute."""
    node.slowdowns = _attempt(lambda: read_slowdowns(machine))


def cards_in_use(hcas: list[Hca], fabric: FabricConfig | None) -> list[Hca]:
    """The cards that the cluster file names; none without a fabric."""
    return [hca for hca in hcas if fabric is not None and hca.name in fabric.hcas]


def read_versions(machine: Machine, gpus: list[Gpu] | Missing, hcas: list[Hca]) -> dict[str, str]:
    """What must be equal on every node: code, packages, driver, kernel, firmware."""
    versions = {"code": code_digest(), "Python": platform.python_version()}
    for package in PACKAGES:
        try:
            versions[package] = version(package)
        except PackageNotFoundError:
            versions[package] = "absent"
    if not isinstance(gpus, Missing):
        versions["GPU driver"] = ", ".join(sorted({gpu.driver for gpu in gpus}))
    if hcas:
        versions["card firmware"] = ", ".join(sorted({hca.firmware for hca in hcas}))
    versions["kernel"] = machine.read("proc/sys/kernel/osrelease") or "unknown"
    return versions


def code_digest() -> str:
    """Hash of this project's modules and YAML files, which all nodes should have alike."""
    digest = hashlib.sha256()
    for folder in ("k25_train", "parallel", "launch", "conf"):
        for path in sorted((CODE / folder).rglob("*")):
            if path.suffix in (".py", ".yaml"):
                digest.update(str(path.relative_to(CODE)).encode() + b"\0" + path.read_bytes())
    return digest.hexdigest()[:12]


def judge_node(node: Node, config: Config, run_bytes: int) -> list[Finding]:
    """Every verdict on the node that needs no other node; each check is judged or skipped with its reason."""
    cluster = config.cluster
    findings = judge_host(
        node.host, memory_gib=cluster.host_memory_gib, run_dir=config.run.dir, run_bytes=run_bytes
    )
    findings += judge_surroundings(node.surroundings, environment(config), cluster)
    findings += _judge_gpus(node, config)
    if cluster.fabric is None:
        reason = f"cluster {cluster.name} has no RDMA fabric (cluster.fabric is null)"
        checks = (*ACCESS_CHECKS, *HCA_CHECKS, TRAFFIC_CLASS, COUNTERS)
        return findings + [skipped(check, reason) for check in checks]
    findings += judge_network_access(node.host, cluster.fabric.interface)
    findings += judge_hcas(node.hcas, cluster.fabric, cluster.gpus_per_node * cluster.network_gb_per_s)
    used = cards_in_use(node.hcas, cluster.fabric)
    findings += judge_traffic_class(used, node.priorities, cluster.fabric.traffic_class)
    if isinstance(node.counters_after, Missing):
        return [*findings, skipped(COUNTERS, node.counters_after.reason)]
    return [*findings, judge_growth(node.counters, node.counters_after)]


def _judge_gpus(node: Node, config: Config) -> list[Finding]:
    cluster = config.cluster
    if cluster.device is Device.cpu:
        reason = f"cluster {cluster.name} computes on CPUs (cluster.device is cpu)"
        return [skipped(check, reason) for check in (*GPU_CHECKS, *PATH_CHECKS, THROTTLING)]
    if isinstance(node.gpus, Missing):
        rule = f"cluster.gpus_per_node is {cluster.gpus_per_node}"
        remedy = "install or repair the driver, or start the container with its GPUs; drain the node"
        rest = (*GPU_CHECKS[1:], *PATH_CHECKS, THROTTLING)
        return [
            failed(GPU_CHECKS[0], node.gpus.reason, rule, remedy),
            *(skipped(check, node.gpus.reason) for check in rest),
        ]
    findings = judge_gpus(node.gpus, cluster.gpus_per_node)
    if isinstance(node.paths, Missing):
        findings += [skipped(check, node.paths.reason) for check in PATH_CHECKS]
    else:
        cards = cards_in_use(node.hcas, cluster.fabric)
        findings += judge_paths(node.paths, [hca.name for hca in cards])
    if isinstance(node.slowdowns, Missing):
        return [*findings, skipped(THROTTLING, node.slowdowns.reason)]
    return [*findings, judge_slowdowns(node.slowdowns)]


def _attempt[Facts](read: Callable[[], Facts]) -> Facts | Missing:
    try:
        return read()
    except (AbsentError, BrokenError) as error:
        return Missing(reason=str(error))


def _priorities(machine: Machine, interface: str) -> Priorities | str:
    found = _attempt(lambda: read_priorities(machine, interface))
    return found.reason if isinstance(found, Missing) else found


def _counters(machine: Machine, hcas: list[Hca]) -> Counters:
    return {hca.name: read_counters(machine, hca) for hca in hcas}
