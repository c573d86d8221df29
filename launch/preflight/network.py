"""The network of one node: everything that is read of its cards, and the verdicts that need no other node."""

from collections.abc import Mapping
from dataclasses import dataclass

from k25_train.config.cluster import ClusterConfig, Device
from k25_train.config.fabric import FabricConfig
from launch.preflight.congestion import ECN, Congestion, judge_congestion, read_congestion
from launch.preflight.counters import LOSS_CHECKS, Counters, judge_loss, read_counters
from launch.preflight.findings import Finding, skipped
from launch.preflight.hcas import HCA_CHECKS, Hca, card_name, judge_hcas, read_hcas
from launch.preflight.links import LINK_CHECKS, Link, judge_links, read_links
from launch.preflight.lossless import LOSSLESS_CHECKS, judge_lossless
from launch.preflight.pcie import PCIE_CHECKS, Slot, judge_slots, read_slots
from launch.preflight.peer_memory import GPUDIRECT, PeerMemory, judge_peer_memory, read_peer_memory
from launch.preflight.priorities import Priorities, read_priorities
from launch.preflight.rails import RAILS, Neighbours, judge_rails, read_neighbours
from launch.preflight.system import Missing, System, try_to_read

NETWORK_CHECKS = (
    *HCA_CHECKS,
    *PCIE_CHECKS,
    *LOSSLESS_CHECKS,
    GPUDIRECT,
    *LINK_CHECKS,
    ECN,
    *LOSS_CHECKS,
)
NOTHING_SENT = Missing(reason="nothing was sent")


@dataclass(slots=True, kw_only=True)
class Network:
    """What was read of a node's cards; counters after the measurements are added later."""

    hcas: list[Hca]
    """All cards of the node; the rest is of those in use."""
    slots: dict[str, Slot]
    priorities: dict[str, Priorities | str]
    """Card, followed by the interface if it has several -> priorities, or why they are unknown."""
    congestion: dict[str, Congestion | Missing]
    links: dict[str, Link]
    peer_memory: PeerMemory
    neighbours: Neighbours | Missing
    counters: Counters
    """Counters before the measurements."""
    counters_after: Counters | Missing = NOTHING_SENT
    """Counters after the measurements."""

    def in_use(self, fabric: FabricConfig | None) -> list[Hca]:
        """Cards that the cluster file names; none if it has no fabric."""
        return cards_in_use(self.hcas, fabric)


def cards_in_use(hcas: list[Hca], fabric: FabricConfig | None) -> list[Hca]:
    """Those of the cards that the cluster file names; none if it has no fabric."""
    return [hca for hca in hcas if fabric is not None and hca.card in fabric.cards]


def read_network(system: System, fabric: FabricConfig | None) -> Network:
    """Read everything that can be read at rest."""
    hcas = read_hcas(system, [] if fabric is None else fabric.cards)
    used = cards_in_use(hcas, fabric)
    return Network(
        hcas=hcas,
        slots=read_slots(system, used),
        priorities={
            f"{hca.name} {name}" if len(hca.interfaces) > 1 else hca.name: _priorities(system, name)
            for hca in used
            for name in hca.interfaces
        },
        congestion=read_congestion(system, used),
        links=read_links(system, used),
        peer_memory=read_peer_memory(system),
        neighbours=try_to_read(read_neighbours, system, used),
        counters=read_counters(system, used),
    )


def read_network_after_load(system: System, network: Network, fabric: FabricConfig | None) -> None:
    """Add the counters after the measurements."""
    network.counters_after = read_counters(system, network.in_use(fabric))


def judge_network(network: Network, cluster: ClusterConfig) -> list[Finding]:
    """Every finding on the node's cards that needs no other node."""
    fabric = cluster.fabric
    if fabric is None:
        reason = f"cluster {cluster.name} has no RDMA fabric (cluster.fabric is null)"
        return [skipped(check, reason) for check in NETWORK_CHECKS]
    # 1. The cards at rest.
    findings = judge_hcas(network.hcas, fabric, cluster.gpus_per_node * cluster.network_gb_per_s)
    used, traffic_class = network.in_use(fabric), fabric.traffic_class
    findings += judge_slots(used, network.slots)
    findings += judge_lossless(used, network.priorities, traffic_class)
    if cluster.device is Device.cpu:
        findings.append(skipped(GPUDIRECT, f"cluster {cluster.name} computes on CPUs"))
    else:
        findings.append(judge_peer_memory(network.peer_memory))
    # 2. What their counters say of the time since boot and of the measurements, if there were any.
    before, after = network.counters, network.counters_after
    findings += judge_links(used, network.links, before, after)
    findings.append(judge_congestion(network.congestion, network.priorities, traffic_class, before, after))
    return findings + judge_loss(before, after)


def judge_all_rails(networks: Mapping[str, Network], cluster: ClusterConfig) -> dict[str, Finding]:
    """Node -> finding on the switches of its cards, compared with those of other nodes."""
    fabric = cluster.fabric
    if fabric is None:
        reason = f"cluster {cluster.name} has no RDMA fabric (cluster.fabric is null)"
        return {node: skipped(RAILS, reason) for node in networks}
    by_node: dict[str, Neighbours | Missing] = {}
    for node, own in networks.items():
        used = own.in_use(fabric)
        on_ethernet = used and all(hca.link_layer == "Ethernet" for hca in used)
        by_node[node] = own.neighbours if on_ethernet else Missing(reason="no card of it is on Ethernet")
    return judge_rails(by_node, [card_name(card) for card in fabric.cards])


def _priorities(system: System, interface: str) -> Priorities | str:
    found = try_to_read(lambda: read_priorities(system, interface))
    return found.reason if isinstance(found, Missing) else found
