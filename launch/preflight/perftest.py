"""Raw rates of the cards: perftest's ib_write_bw between the same cards of two nodes, where it is installed.

It tells a slow card, cable or switch from a slow NCCL: nothing but RDMA writes between the hosts' memories.
All rails of a node are measured at the same time, as training uses them. Nodes are a ring, so each measures
with two others, and a card is slow if its better connection is.
"""

import re
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

from k25_train.config.fabric import DETECT, AddressFamily, FabricConfig
from launch.preflight.groups import Pair, ring_rounds
from launch.preflight.hcas import Hca
from launch.preflight.path_mtu import rails_of
from launch.preflight.system import BrokenError, Missing, System, try_to_read

TOOL = "ib_write_bw"
SECONDS = 2
"""Duration of a measurement; connecting takes another second."""
FIRST_PORT = 18515
"""perftest's own; each rail of each round has another, as closed ones stay in use for a while."""
SERVER_START_S = 1.0
"""Time in which a server that was started listens."""
NUM_TRIES = 4
NO_SERVER = "Couldn't connect to"
"""What a client says while no server listens."""
BY_IPV6 = ("--ipv6", "--ipv6-addr")
"""GIDs of IPv6, and meeting over it; perftest 6.06, as in Debian 12, lacks the second."""


@dataclass(frozen=True, slots=True, kw_only=True)
class RawEnd:
    """A card as perftest needs it."""

    device: str
    port: int
    gid_index: int
    address: str
    rate_gbps: float


@dataclass(frozen=True, slots=True, kw_only=True)
class RawLink:
    """A measured connection between the same card of two nodes."""

    card: str
    pair: tuple[int, int]
    """Leaders of the nodes, the server's first."""
    gbps: float | Missing
    """Rate in one direction, or what went wrong."""
    rate_gbps: float
    """The slower of both cards' speeds."""


def raw_ends(system: System, hcas: Sequence[Hca], fabric: FabricConfig | None) -> dict[str, RawEnd] | Missing:
    """Card -> its end, of cards with a known speed and address; the reason if perftest is not there."""
    if fabric is None:
        return Missing(reason="the cluster has no RDMA fabric")
    # Its status is 1, so the text may be that of an error.
    shown = try_to_read(system.run, [TOOL, "--help"])
    text = shown.reason if isinstance(shown, Missing) else shown
    if text == f"{TOOL} is not installed":
        return Missing(reason=f"{text}: install perftest on the nodes or in the image")
    if fabric.address_family is AddressFamily.ipv6 and BY_IPV6[1] not in text:
        return Missing(reason=f"this perftest has no {BY_IPV6[1]}: install a later one")
    rows = {
        hca.name: next(
            (gid for gid in hca.routable_gids if _is_wanted(gid.index, bool(gid.ipv4), fabric)), None
        )
        for hca in hcas
    }
    addresses = {rail.card: rail.address for rail in rails_of(hcas, fabric)}
    return {
        hca.name: RawEnd(
            device=hca.card.device,
            port=hca.card.port,
            gid_index=row.index,
            address=addresses[hca.name],
            rate_gbps=hca.rate_gbps,
        )
        for hca in hcas
        if (row := rows[hca.name]) is not None and hca.rate_gbps and hca.name in addresses
    }


def node_rounds(num_nodes: int) -> list[list[Pair]]:
    """Rounds of disjoint pairs of nodes, numbered from 0, in which each meets its neighbours in a ring."""
    return list(ring_rounds(range(num_nodes)))


def command(end: RawEnd, traffic_class: int, port: int, server: str | None) -> list[str]:
    """Words of a measurement; of the server's side if `server` is None."""
    words = [
        TOOL,
        "-d",
        end.device,
        "-i",
        str(end.port),
        "-x",
        str(end.gid_index),
        f"--tclass={traffic_class}",
    ]
    words += ["-p", str(port), "-D", str(SECONDS), "-q", "4", "-s", "1048576", "-F", "--report_gbits"]
    if ":" in end.address:
        words += BY_IPV6
    return words if server is None else [*words, server]


def parse_gbps(text: str) -> float:
    """Average rate in what ib_write_bw printed. Raises `BrokenError` if there is none.

    Warnings about the processor's clock come between heading and row.
    """
    _, heading, rest = text.partition("BW average[Gb/sec]")
    row = re.search(r"^\s*\d+\s+\d+\s+[\d.]+\s+([\d.]+)(\s|$)", rest, re.MULTILINE) if heading else None
    if row is None:
        raise BrokenError(f"{TOOL} printed no average rate in Gb/s")
    return float(row[1])


def measure_round(
    system: System,
    own: Mapping[str, RawEnd],
    other: Mapping[str, RawEnd],
    pair: Pair,
    number: int,
    *,
    is_server: bool,
    traffic_class: int,
    ready: Callable[[], object],
) -> list[RawLink]:
    """Measure all rails of a pair of nodes at the same time.

    Args:
        system: runs the commands.
        own: this node's ends.
        other: the other node's ends.
        pair: leaders of the nodes, the server's first.
        number: of the round.
        is_server: which side this node is.
        traffic_class: `cluster.fabric.traffic_class`.
        ready: called when this server is started; of the client, returns when the other is.

    Returns: the rates, by the client; the server returns none.
    """
    cards = [card for card in own if card in other]
    ports = {card: FIRST_PORT + len(cards) * number + at for at, card in enumerate(cards)}

    def run(card: str) -> float | Missing:
        server = None if is_server else other[card].address
        words = command(own[card], traffic_class, ports[card], server)
        return try_to_read(lambda: parse_gbps(_run_patiently(system, words)))

    with ThreadPoolExecutor(max_workers=max(1, len(cards))) as pool:
        if not is_server:
            ready()
            time.sleep(SERVER_START_S)
        rates = pool.map(run, cards)
        if is_server:
            ready()
        measured = dict(zip(cards, rates, strict=True))
    if is_server:
        return []
    speeds = {card: min(own[card].rate_gbps, other[card].rate_gbps) for card in cards}
    return [RawLink(card=c, pair=pair, gbps=measured[c], rate_gbps=speeds[c]) for c in cards]


def _run_patiently(system: System, words: Sequence[str]) -> str:
    for _ in range(NUM_TRIES - 1):
        try:
            return system.run(words)
        except BrokenError as error:
            if NO_SERVER not in str(error):
                raise
            time.sleep(SERVER_START_S)
    return system.run(words)


def _is_wanted(index: int, is_ipv4: bool, fabric: FabricConfig) -> bool:
    if fabric.gid_index != DETECT:
        return index == fabric.gid_index
    return is_ipv4 == (fabric.address_family is AddressFamily.ipv4)
