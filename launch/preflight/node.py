"""One node: everything that is read from it, and the verdicts that need no other node."""

from dataclasses import dataclass
from pathlib import Path

from k25_train.config.basics import is_url
from k25_train.config.schema import Config
from k25_train.run_folder.checkpoints import CHECKPOINTS
from launch.fabric import environment
from launch.preflight.accelerators import (
    Accelerators,
    judge_accelerators,
    read_accelerators,
    read_accelerators_after_load,
    read_accelerators_under_load,
)
from launch.preflight.environment import RankEnvironment, judge_environment, read_environment
from launch.preflight.findings import Finding, skipped
from launch.preflight.hcas import Hca
from launch.preflight.host import ACCESS_CHECKS, Host, judge_host, judge_network_access, read_host
from launch.preflight.machine import Machine, judge_machine, read_machine
from launch.preflight.network import Network, judge_network, read_network, read_network_after_load
from launch.preflight.system import Missing, System
from launch.preflight.traits import read_traits


@dataclass(slots=True, kw_only=True)
class Node:
    """What was read from a node; what is read under load and after the measurements is added later."""

    name: str
    host: Host
    surroundings: RankEnvironment
    """Environment of the node's leader, under its key in preflight.json."""
    machine: Machine
    accelerators: Accelerators
    network: Network
    versions: dict[str, str]
    traits: dict[str, str]
    """What nodes should be alike in -> what this one has."""


def read_node(system: System, name: str, config: Config) -> Node:
    """Read everything that can be read at rest."""
    machine = read_machine(system)
    accelerators = read_accelerators(system, machine.up_s)
    network = read_network(system, config.cluster.fabric)
    host = read_host(system, checkpoint_folder(config))
    return Node(
        name=name,
        host=host,
        surroundings=read_environment(system),
        machine=machine,
        accelerators=accelerators,
        network=network,
        versions=read_versions(system, accelerators, network.in_use(config.cluster.fabric)),
        traits=read_traits(system, host, accelerators),
    )


def checkpoint_folder(config: Config) -> Path | None:
    """Folder of the run's checkpoints, absolute; None if they are in an object store."""
    place = config.checkpoint.dir
    if place is None:
        return Path(config.run.dir).absolute() / CHECKPOINTS
    return None if is_url(place) else Path(place).absolute()


def read_after_load(system: System, node: Node, config: Config) -> None:
    """Add the counters after the measurements."""
    read_accelerators_after_load(system, node.accelerators)
    read_network_after_load(system, node.network, config.cluster.fabric)


def read_under_load(system: System, node: Node) -> None:
    """Add clocks and links of the GPUs; to be called while they compute."""
    read_accelerators_under_load(system, node.accelerators)


def read_versions(system: System, accelerators: Accelerators, hcas: list[Hca]) -> dict[str, str]:
    """Versions of what Python does not see, and should be the same on all nodes: driver, firmware, kernel."""
    versions: dict[str, str] = {}
    if not isinstance(accelerators.gpus, Missing):
        versions["GPU driver"] = ", ".join(sorted({gpu.driver for gpu in accelerators.gpus}))
    versions["CUDA"] = accelerators.driver.build.cuda or "none"
    if hcas:
        versions["card firmware"] = ", ".join(sorted({hca.firmware for hca in hcas}))
    versions["kernel"] = system.read("proc/sys/kernel/osrelease") or "unknown"
    return versions


def judge_node(node: Node, config: Config, one_bytes: int) -> list[Finding]:
    """Every finding that needs no other node; a check that cannot be made is skipped with its reason.

    `one_bytes` is the size of a checkpoint.
    """
    cluster = config.cluster
    # 1. Host, environment, machine, GPUs.
    findings = judge_host(
        node.host,
        memory_gib=cluster.host_memory_gib,
        checkpoints=config.checkpoint.dir or config.run.dir,
        num_kept=config.checkpoint.keep,
        one_bytes=one_bytes,
    )
    findings += judge_environment(node.surroundings, environment(config), cluster)
    findings += judge_machine(node.machine, node.accelerators.driver.build, config)
    cards = list(dict.fromkeys(hca.card.device for hca in node.network.in_use(cluster.fabric)))
    findings += judge_accelerators(node.accelerators, cluster, cards)
    # 2. Network, if training uses any.
    if cluster.fabric is None:
        reason = f"cluster {cluster.name} has no RDMA fabric (cluster.fabric is null)"
        findings += [skipped(check, reason) for check in ACCESS_CHECKS]
    else:
        findings += judge_network_access(node.host, cluster.fabric.interfaces)
    return findings + judge_network(node.network, cluster)
