"""MTU between nodes: packets that a switch drops are found, on real interfaces, and the right node named."""

import contextlib
import os
import shutil
from dataclasses import replace

import pytest

from k25_train.compose.resolve import compose
from k25_train.config.schema import Config
from launch.preflight.findings import Verdict
from launch.preflight.measurements import judge_measurements
from launch.preflight.network import read_network
from launch.preflight.path_mtu import PathTry, Rail, answering, rails_of, try_path, try_paths
from launch.preflight.path_verdicts import judge_path_mtu
from launch.preflight.rank import RankMeasurements
from launch.preflight.reach import neighbours
from tests.helpers.network_nodes import INTERFACE, inside, switched_machines
from tests.helpers.recorded_node import RecordedNode

LOOPBACK = Rail(card="mlx5_0", interface="lo", address="127.0.0.1", mtu_bytes=9000)
needs_root = pytest.mark.skipif(
    os.geteuid() != 0 or shutil.which("ip") is None,
    reason="makes network namespaces: needs root and iproute2",
)
FULL, SMALL = 9000, 1500
NUM_RAILS = 8


def test_a_packet_arrives_in_full_size() -> None:
    with answering([LOOPBACK]) as rails:
        tried = try_path(LOOPBACK, rails["mlx5_0"], 4)
    assert tried == PathTry(card="mlx5_0", target=4, wanted_bytes=FULL, arrived_bytes=FULL)


def test_without_an_answer_nothing_arrived() -> None:
    with answering([LOOPBACK]) as rails:
        closed = rails["mlx5_0"]
    tried = try_path(LOOPBACK, closed, 4)
    assert tried.arrived_bytes == 0 and "refused" in tried.reason
    missing = replace(LOOPBACK, interface="roce9")
    with answering([missing, LOOPBACK]) as rails:
        assert list(rails) == ["mlx5_0"] and rails["mlx5_0"].port
        assert "No such device" in try_path(missing, rails["mlx5_0"], 4).reason


@needs_root
def test_a_switch_port_that_drops_large_packets_is_found() -> None:
    """Interfaces have 9000 bytes on all three machines; the third one's port of the switch has 1500."""

    def rails(number: int) -> list[Rail]:
        addresses = {"mlx5_4": f"10.78.0.{number + 1}", "mlx5_6": f"fd78::{number + 1}"}
        return [
            Rail(card=card, interface=INTERFACE, address=address, mtu_bytes=FULL)
            for card, address in addresses.items()
        ]

    with switched_machines(3, FULL, {2: SMALL}) as spaces, contextlib.ExitStack() as stack:
        listening = {}
        for number, space in enumerate(spaces):
            with inside(space):
                listening[number] = stack.enter_context(answering(rails(number)))
        tries = {}
        for number, others in enumerate(({1, 2}, {2}, {1})):
            with inside(spaces[number]):
                targets = {other: listening[other] for other in others}
                tries["abc"[number]] = try_paths(rails(number), targets)
    assert {(one.target, one.arrived_bytes) for one in tries["a"]} == {(1, FULL), (2, SMALL)}
    findings = judge_path_mtu(tries, {0: "a", 1: "b", 2: "c"}, "abc", "")
    assert [findings[node].verdict for node in "abc"] == [Verdict.passed, Verdict.passed, Verdict.failed]
    assert findings["c"].found == ("over all 2 cards, packets of 9000 bytes do not arrive; those of 1500 do")
    assert "switch ports" in findings["c"].remedy


def test_rails_are_the_cards_addresses(recorded: RecordedNode, config: Config) -> None:
    fabric = config.cluster.fabric
    hcas = read_network(recorded.system, fabric).in_use(fabric)
    assert rails_of(hcas, fabric)[5] == Rail(
        card="mlx5_5", interface="eth5", address="10.10.5.5", mtu_bytes=FULL
    )
    assert rails_of(hcas, None) == []
    ipv6 = compose(["experiment=k25_pretrain_4k", "cluster.fabric.address_family=ipv6"]).cluster.fabric
    assert rails_of(hcas, ipv6) == []
    recorded.write_gid(5, 3, "fd93:0016:d59a:0000:0000:0000:0a0a:0505", "RoCE v2")
    hcas = read_network(recorded.system, ipv6).in_use(ipv6)
    assert [rail.address for rail in rails_of(hcas, ipv6)] == ["fd93:16:d59a::a0a:505"]


def tries_of(num_nodes: int, lost: dict[tuple[int, int, int], int]) -> dict[str, list[PathTry]]:
    """Tries of all rails of all nodes; `lost` maps (node, other, rail) to the largest size that arrives."""
    return {
        f"n{node}": [
            PathTry(
                card=f"mlx5_{rail}",
                target=other,
                wanted_bytes=FULL,
                arrived_bytes=lost.get((node, other, rail), FULL),
            )
            for other in neighbours(node, num_nodes)
            for rail in range(NUM_RAILS)
        ]
        for node in range(num_nodes)
    }


def judged(num_nodes: int, lost: dict[tuple[int, int, int], int]) -> dict[str, tuple[Verdict, str]]:
    names = {node: f"n{node}" for node in range(num_nodes)}
    findings = judge_path_mtu(tries_of(num_nodes, lost), names, list(names.values()), "")
    return {node: (one.verdict, one.found) for node, one in findings.items()}


def all_pairs(num_nodes: int) -> list[tuple[int, int]]:
    return [(node, other) for node in range(num_nodes) for other in neighbours(node, num_nodes)]


@pytest.mark.parametrize(("arrives", "verdict"), [(SMALL, Verdict.failed), (0, Verdict.warned)])
def test_the_node_whose_port_is_wrong_is_named_with_its_rail(arrives: int, verdict: Verdict) -> None:
    lost = {(a, b, 6): arrives for a, b in all_pairs(32) if b == 17}
    found = judged(32, lost)
    assert {node for node, (own, _) in found.items() if own is not Verdict.passed} == {"n17"}
    assert found["n17"][0] is verdict and "mlx5_6" in found["n17"][1]
    assert found["n3"][1] == "9000 bytes over 8 rails to 3 nodes, except from and to nodes that fail"


def test_a_fabric_of_small_packets_reads_the_same_on_all_nodes() -> None:
    """So the report has one line for 512 nodes."""
    lost = {(a, b, rail): SMALL for a, b in all_pairs(512) for rail in range(NUM_RAILS)}
    found = judged(512, lost)
    assert set(found.values()) == {
        (Verdict.failed, "over all 8 cards, packets of 9000 bytes do not arrive; those of 1500 do")
    }


def test_what_is_filtered_says_nothing_of_the_mtu() -> None:
    lost = {(a, b, rail): 0 for a, b in all_pairs(4) for rail in range(NUM_RAILS)}
    assert {own for own, _ in judged(4, lost).values()} == {Verdict.skipped}


def test_why_nothing_was_tried(config: Config) -> None:
    def reason(chosen: Config, *measured: RankMeasurements) -> str:
        names = {rank: f"n{rank}" for rank in range(len(measured))}
        own = judge_measurements(dict(enumerate(measured)), names, chosen)["n0"]
        (finding,) = [one for one in own if one.check == "MTU between nodes"]
        assert finding.verdict is Verdict.skipped
        return finding.found

    nothing = RankMeasurements()
    assert "fabric is null" in reason(compose(["experiment=smoke"]), nothing)
    assert reason(config, nothing) == "there is no other node"
    assert reason(config, nothing, nothing) == "measuring broke off earlier"
    assert "no card has" in reason(config, RankMeasurements(paths=[]), nothing)
