"""Which pairs of nodes measure raw rates when; they agree through the store."""

from collections.abc import Sequence
from functools import partial

from k25_train.config.fabric import FabricConfig
from launch.preflight.coordination import Coordinator
from launch.preflight.hcas import Hca
from launch.preflight.perftest import RawEnd, RawLink, measure_round, node_rounds, raw_ends
from launch.preflight.system import Missing, System


def measure_raw_rates(
    coordinator: Coordinator,
    system: System,
    hcas: Sequence[Hca],
    fabric: FabricConfig | None,
    timeout_s: float,
) -> list[RawLink] | Missing:
    """Rates of this node's cards where it was the client; called by the node leaders at the same time.

    Pairs of which one has no perftest are left out, and so are those that do not answer within `timeout_s`.
    """
    own = raw_ends(system, hcas, fabric)
    coordinator.publish("raw", {} if isinstance(own, Missing) else own)
    if isinstance(own, Missing):
        return own
    assert fabric is not None
    leaders = coordinator.node_leaders
    links: list[RawLink] = []
    for number, pairs in enumerate(node_rounds(len(leaders))):
        pair = next((pair for pair in pairs if leaders.index(coordinator.rank) in pair), None)
        if pair is None:
            continue
        server, client = leaders[pair[0]], leaders[pair[1]]
        other = client if coordinator.rank == server else server
        theirs = coordinator.collect("raw", [other], dict[str, RawEnd], timeout_s).get(other, {})
        if not theirs:
            continue
        phase = f"raw rates, round {number}"
        is_server = coordinator.rank == server
        links += measure_round(
            system,
            own,
            theirs,
            (server, client),
            number,
            is_server=is_server,
            traffic_class=fabric.traffic_class,
            ready=partial(coordinator.publish, phase, True)
            if is_server
            else partial(coordinator.collect, phase, [server], bool, timeout_s),
        )
    return links
