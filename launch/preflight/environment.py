"""Environment of a rank: the fabric's variables, and the address that the host name resolves to."""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from k25_train.config.cluster import ClusterConfig
from launch.preflight.findings import Finding, passed, skipped, warned
from launch.preflight.system import System
from launch.variables import UNREAD, Variable

VARIABLES, ADDRESS = ENVIRONMENT_CHECKS = ("variables", "host name")
FABRIC_VARIABLE = re.compile(r"(TORCH_)?NCCL_\w+|GLOO_\w+|CUDA_DEVICE_MAX_CONNECTIONS|CUDA_LAUNCH_BLOCKING")


@dataclass(frozen=True, slots=True, kw_only=True)
class RankEnvironment:
    """Environment of the rank that reads a node."""

    is_rank: bool
    """Whether torchrun started it."""
    variables: Mapping[str, str]
    """Variables that communication libraries read."""
    address: str | None
    """Address that the host's name resolves to; None if it does not resolve."""


def read_environment(system: System) -> RankEnvironment:
    """Read the variables of this process and the address of its host."""
    variables = {
        name: value
        for name, value in system.environment.items()
        if FABRIC_VARIABLE.fullmatch(name) and name not in UNREAD
    }
    is_rank = "RANK" in system.environment
    return RankEnvironment(is_rank=is_rank, variables=variables, address=system.resolve())


def judge_environment(
    own: RankEnvironment, wanted: Sequence[Variable], cluster: ClusterConfig
) -> list[Finding]:
    """Compare variables with those of the cluster file, `wanted`, and check that gloo can be reached here."""
    wanted_values = {one.name: one.value for one in wanted if FABRIC_VARIABLE.fullmatch(one.name)}
    # If the cluster file has no fabric, additional settings contradict nothing.
    extra = own.variables.keys() - wanted_values.keys() if cluster.fabric is not None else set()
    return [_judge_variables(own, wanted_values, sorted(extra)), _judge_address(own, cluster.nodes)]


def _judge_variables(own: RankEnvironment, wanted: Mapping[str, str], extra: Sequence[str]) -> Finding:
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
        rule = "the cluster file alone determines them"
        remedy = "start with launch.slurm or launch.torchrun, and unset the others"
        return warned(check, "; ".join(other), rule, remedy)
    if not wanted:
        return skipped(check, "the cluster file sets none")
    return passed(check, f"{len(wanted)} as in the cluster file")


def _judge_address(own: RankEnvironment, num_nodes: int) -> Finding:
    check = ADDRESS
    if num_nodes == 1:
        return skipped(check, "a single node needs no address")
    if interface := own.variables.get("GLOO_SOCKET_IFNAME"):
        return passed(check, f"not used: gloo listens on {interface}")
    if own.address is None or own.address.startswith("127."):
        rule = "gloo listens on the address of the host's name, which other nodes must reach"
        remedy = (
            "name this node's address in /etc/hosts, or set GLOO_SOCKET_IFNAME (cluster.fabric.interface)"
        )
        # Only a warning: nodes that share a machine do reach each other, and connections are measured anyway.
        return warned(check, f"resolves to {own.address or 'nothing'}", rule, remedy)
    return passed(check, own.address)
