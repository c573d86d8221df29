"""The network of one node: everything that is read of its cards, and the verdicts that need no other node."""

from dataclasses import dataclass

from k25_train.config.cluster import ClusterConfig
from k25_train.config.fabric import FabricConfig
from launch.preflight.findings import Finding, skipped
from launch.preflight.hcas import HCA_CHECKS, Hca, judge_hcas, read_hcas
from launch.preflight.lossless import (
    COUNTERS,
    TRAFFIC_CLASS,
    Counters,
    Priorities,
    judge_growth,
    judge_traffic_class,
    read_counters,
    read_priorities,
)
from launch.preflight.system import Missing, System, try_to_read

NOTHING_SENT = Missing(reason="nothing was sent")


@dataclass(slots=True, kw_only=True)
class Network:
    """What was read of a node's cards; counters after the measurements are added later."""

    hcas: list[Hca]
    priorities: dict[str, Priorities | str]
    """Card, followed by the interface if it has several -> priorities, or why they are unknown."""
    counters: Counters
    """Counters before the measurements."""
    counters_after: Counters | Missing = NOTHING_SENT
    """Counters after the measurements."""

    def in_use(self, fabric: FabricConfig | None) -> list[Hca]:
        """Cards that the cluster file names; none if it has no fabric."""
        return [hca for hca in self.hcas if fabric is not None and hca.card in fabric.cards]


def read_network(system: System, fabric: FabricConfig | None) -> Network:
    """Read everything that can be read at rest."""
    network = Network(
        hcas=read_hcas(system, [] if fabric is None else fabric.cards), priorities={}, counters={}
    )
    used = network.in_use(fabric)
    network.priorities = {
        f"{hca.name} {name}" if len(hca.interfaces) > 1 else hca.name: _priorities(system, name)
        for hca in used
        for name in hca.interfaces
    }
    network.counters = _counters(system, used)
    return network


def read_network_after_load(system: System, network: Network, fabric: FabricConfig | None) -> None:
    """Add the counters after the measurements."""
    network.counters_after = _counters(system, network.in_use(fabric))


def judge_network(network: Network, cluster: ClusterConfig) -> list[Finding]:
    """Every finding on the node's cards that needs no other node."""
    fabric = cluster.fabric
    if fabric is None:
        reason = f"cluster {cluster.name} has no RDMA fabric (cluster.fabric is null)"
        return [skipped(check, reason) for check in (*HCA_CHECKS, TRAFFIC_CLASS, COUNTERS)]
    # 1. The cards at rest.
    findings = judge_hcas(network.hcas, fabric, cluster.gpus_per_node * cluster.network_gb_per_s)
    used = network.in_use(fabric)
    findings += judge_traffic_class(used, network.priorities, fabric.traffic_class)
    # 2. Loss during the measurements, if there were any.
    if isinstance(network.counters_after, Missing):
        return [*findings, skipped(COUNTERS, network.counters_after.reason)]
    return [*findings, judge_growth(network.counters, network.counters_after)]


def _priorities(system: System, interface: str) -> Priorities | str:
    found = try_to_read(lambda: read_priorities(system, interface))
    return found.reason if isinstance(found, Missing) else found


def _counters(system: System, hcas: list[Hca]) -> Counters:
    return {hca.name: read_counters(system, hca) for hca in hcas}
