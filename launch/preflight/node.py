"""One node: everything that is read from it, and the verdicts that need no other node."""

import hashlib
import platform
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

from k25_train.config.cluster import Device
from k25_train.config.schema import Config
from launch.fabric import environment
from launch.preflight.affinity import PATH_CHECKS, Paths, judge_paths, read_paths
from launch.preflight.environment import RankEnvironment, judge_environment, read_environment
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
from launch.preflight.hcas import Hca
from launch.preflight.host import ACCESS_CHECKS, Host, judge_host, judge_network_access, read_host
from launch.preflight.network import Network, judge_network, read_network, read_network_after_load
from launch.preflight.system import Missing, System, try_to_read

CHECKOUT = Path(__file__).resolve().parents[2]
PACKAGES = ("torch", "megatron-core", "emerging-optimizers", "transformer-engine", "nvidia-nccl-cu13")
"""Distributions that must have the same version on all nodes."""


NOTHING_MEASURED = Missing(reason="nothing was measured")


@dataclass(slots=True, kw_only=True)
class Node:
    """What was read from a node; counters after the measurements and clocks under load are added later."""

    name: str
    host: Host
    surroundings: RankEnvironment
    """Environment of the node's leader, under its key in preflight.json."""
    gpus: list[Gpu] | Missing
    paths: Paths | Missing
    network: Network
    versions: dict[str, str]
    slowdowns: dict[int, int] | Missing = NOTHING_MEASURED
    """GPU -> bits of the reasons for reduced clocks, read under load."""


def read_node(system: System, name: str, config: Config) -> Node:
    """Read everything that can be read at rest."""
    gpus = try_to_read(lambda: read_gpus(system))
    network = read_network(system, config.cluster.fabric)
    return Node(
        name=name,
        host=read_host(system, Path(config.run.dir).absolute()),
        surroundings=read_environment(system),
        gpus=gpus,
        paths=try_to_read(lambda: read_paths(system)),
        network=network,
        versions=read_versions(system, gpus, network.in_use(config.cluster.fabric)),
    )


def read_after_load(system: System, node: Node, config: Config) -> None:
    """Add the counters after the measurements."""
    read_network_after_load(system, node.network, config.cluster.fabric)


def read_under_load(system: System, node: Node) -> None:
    """Add the reasons for reduced clocks; to be called while the GPUs compute."""
    node.slowdowns = try_to_read(lambda: read_slowdowns(system))


def read_versions(system: System, gpus: list[Gpu] | Missing, hcas: list[Hca]) -> dict[str, str]:
    """Versions that should be the same on all nodes: code, packages, driver, kernel, firmware."""
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
    versions["kernel"] = system.read("proc/sys/kernel/osrelease") or "unknown"
    return versions


def code_digest() -> str:
    """Hash of this project's modules and YAML files, which should be the same on all nodes."""
    digest = hashlib.sha256()
    for folder in ("k25_train", "parallel", "launch", "conf"):
        for path in sorted((CHECKOUT / folder).rglob("*")):
            if path.suffix in (".py", ".yaml"):
                digest.update(str(path.relative_to(CHECKOUT)).encode() + b"\0" + path.read_bytes())
    return digest.hexdigest()[:12]


def judge_node(node: Node, config: Config, one_bytes: int) -> list[Finding]:
    """Every finding that needs no other node; a check that cannot be made is skipped with its reason.

    `one_bytes` is the size of a checkpoint.
    """
    cluster = config.cluster
    # 1. Host, environment, GPUs.
    findings = judge_host(
        node.host,
        memory_gib=cluster.host_memory_gib,
        run_dir=config.run.dir,
        num_kept=config.checkpoint.keep,
        one_bytes=one_bytes,
    )
    findings += judge_environment(node.surroundings, environment(config), cluster)
    findings += _judge_gpus(node, config)
    # 2. Network, if training uses any.
    if cluster.fabric is None:
        reason = f"cluster {cluster.name} has no RDMA fabric (cluster.fabric is null)"
        findings += [skipped(check, reason) for check in ACCESS_CHECKS]
    else:
        findings += judge_network_access(node.host, cluster.fabric.interfaces)
    return findings + judge_network(node.network, cluster)


def _judge_gpus(node: Node, config: Config) -> list[Finding]:
    cluster = config.cluster
    if cluster.device is Device.cpu:
        reason = f"cluster {cluster.name} computes on CPUs (cluster.device is cpu)"
        return [skipped(check, reason) for check in (*GPU_CHECKS, *PATH_CHECKS, THROTTLING)]
    # Without nvidia-smi, one check fails and the others are skipped.
    if isinstance(node.gpus, Missing):
        rule = f"cluster.gpus_per_node is {cluster.gpus_per_node}"
        remedy = "install or repair the driver, or start the container with GPUs; drain the node"
        rest = (*GPU_CHECKS[1:], *PATH_CHECKS, THROTTLING)
        return [
            failed(GPU_CHECKS[0], node.gpus.reason, rule, remedy),
            *(skipped(check, node.gpus.reason) for check in rest),
        ]
    findings = judge_gpus(node.gpus, cluster.gpus_per_node)
    if isinstance(node.paths, Missing):
        findings += [skipped(check, node.paths.reason) for check in PATH_CHECKS]
    else:
        cards = node.network.in_use(cluster.fabric)
        findings += judge_paths(node.paths, list(dict.fromkeys(hca.card.device for hca in cards)))
    if isinstance(node.slowdowns, Missing):
        return [*findings, skipped(THROTTLING, node.slowdowns.reason)]
    return [*findings, judge_slowdowns(node.slowdowns)]
