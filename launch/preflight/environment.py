"""What a rank is started with: the variables of the fabric, and the address that its host name stands for."""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from k25_train.config.cluster import ClusterConfig
from launch.fabric import Variable
from launch.preflight.findings import Finding, passed, skipped, warned
from launch.preflight.machine import Machine

VARIABLES, ADDRESS = SURROUNDING_CHECKS = ("variables", "host name")
OF_FABRIC = re.compile(r"(NCCL|GLOO)_\w+|CUDA_DEVICE_MAX_CONNECTIONS")
INFORMATIVE = ("NCCL_VERSION",)
"""Variables that images carry and no library obeys."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Surroundings:
    """Of the rank that reads a node."""

    is_rank: bool
    """Whether torchrun started it."""
    variables: Mapping[str, str]
    """Those that libraries of communication obey."""
    address: str | None
    """What the host's name resolves to; None where it does not."""


def read_surroundings(machine: Machine) -> Surroundings:
    """Variables and address of this process and its host."""
    variables = {
        name: value
        for name, value in machine.environment.items()
        if OF_FABRIC.fullmatch(name) and name not in INFORMATIVE
    }
    is_rank = "RANK" in machine.environment
    return Surroundings(is_rank=is_rank, variables=variables, address=machine.resolve())


def judge_surroundings(
    own: Surroundings, wanted: Sequence[Variable], cluster: ClusterConfig
) -> list[Finding]:
    """Variables against those of the cluster file, `wanted`, and whether other nodes can reach gloo here."""
    wanted_values = {one.name: one.value for one in wanted if OF_FABRIC.fullmatch(one.name)}
    # Without a fabric in the cluster file, what somebody sets for it contradicts nothing.
    extra = own.variables.keys() - wanted_values.keys() if cluster.fabric is not None else set()
    return [_judge_variables(own, wanted_values, sorted(extra)), _judge_address(own, cluster.nodes)]


def _judge_variables(own: Surroundings, wanted: Mapping[str, str], extra: Sequence[str]) -> Finding:
    check = VARIABLES
    if not own.is_rank:
        return skipped(check, "not started as a rank; launch.slurm and launch.torchrun set them")
    other = [
        f"{name} is {own.variables.get(name, 'not set')}, not {value}"
        for name, value in wanted.items()
        if own.variables.get(name) != value
    ]
    other += [f"{name}={own.variables[name]} is set" for name in extra]
    if other:
        rule = "they follow from the cluster file alone"
        remedy = "start with launch.slurm or launch.torchrun, and unset the others"
        return warned(check, "; ".join(other), rule, remedy)
    return passed(check, f"{len(wanted)} as the cluster file has it")


def _judge_address(own: Surroundings, num_nodes: int) -> Finding:
    check = ADDRESS
    if num_nodes == 1:
        return skipped(check, "one node talks to itself")
    if interface := own.variables.get("GLOO_SOCKET_IFNAME"):
        return passed(check, f"not used: gloo listens on {interface}")
    if own.address is None or own.address.startswith("127."):
        rule = "gloo listens on the address of the host's name, which other nodes must reach"
        remedy = (
            "name this node's address in /etc/hosts, or set GLOO_SOCKET_IFNAME (cluster.fabric.interface)"
        )
        # Nodes that share a machine reach each other all the same; whether ranks do is measured.
        return warned(check, f"resolves to {own.address or 'nothing'}", rule, remedy)
    return passed(check, own.address)
