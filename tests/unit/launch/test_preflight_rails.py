"""Cards that are plugged into another rail's switch, from what lldpd hears."""

import json
from typing import Any

import pytest

from k25_train.compose.resolve import compose
from k25_train.config.schema import Config
from launch.preflight.findings import Finding, Verdict
from launch.preflight.network import judge_all_rails, read_network
from launch.preflight.rails import Neighbour, Neighbours, judge_rails, parse_lldpctl
from launch.preflight.system import AbsentError, BrokenError, Missing
from tests.helpers.recorded_node import RecordedNode

NUM_CARDS = 8
CARDS = [f"mlx5_{number}" for number in range(NUM_CARDS)]


def json0(switches: dict[str, str]) -> str:
    """What `lldpctl -f json0` of lldpd 1.0.16 prints: everything is a list."""
    entries = [
        {
            "name": interface, "via": "LLDP", "rid": "1", "age": "12 days, 03:10:44",
            "chassis": [{
                "id": [{"type": "mac", "value": "7c:8c:09:aa:00:01"}], "name": [{"value": switch}],
                "descr": [{"value": "Cumulus Linux version 5.9.2 running on Mellanox MSN5600"}],
                "mgmt-ip": [{"value": "10.1.0.11"}],
                "capability": [{"type": "Bridge", "enabled": True}, {"type": "Router", "enabled": True}],
            }],
            "port": [{"id": [{"type": "ifname", "value": "swp17s0"}], "descr": [{"value": "gpu-node"}],
                      "ttl": [{"value": "120"}]}],
        }
        for interface, switch in switches.items()
    ]  # fmt: skip
    return json.dumps({"lldp": [{"interface": entries}]})


PORT: dict[str, Any] = {"id": {"type": "ifname", "value": "swp17s0"}, "descr": "gpu-node", "ttl": "120"}
NAMED = {
    "via": "LLDP",
    "rid": "1",
    "chassis": {"leaf1": {"id": {"type": "mac", "value": "7c:8c"}}},
    "port": PORT,
}
NAMELESS = {"via": "LLDP", "chassis": {"id": {"type": "mac", "value": "7c:8c:09:aa:00:02"}}, "port": PORT}
LEAF1 = Neighbour(switch="leaf1", port="swp17s0")


@pytest.mark.parametrize(
    ("text", "found"),
    [
        (json0({"eth0": "leaf1", "eth1": "leaf1"}), {"eth0": LEAF1, "eth1": LEAF1}),
        # One interface is no list, several are one of objects with one key each (lldpd 1.0).
        (json.dumps({"lldp": {"interface": {"eth0": NAMED}}}), {"eth0": LEAF1}),
        (
            json.dumps({"lldp": {"interface": [{"eth0": NAMED}, {"eth1": NAMELESS}]}}),
            {"eth0": LEAF1, "eth1": Neighbour(switch="7c:8c:09:aa:00:02", port="swp17s0")},
        ),
        # Nobody was heard.
        ('{"lldp": {}}', {}),
        ('{"lldp": [{}]}', {}),
    ],
)
def test_formats_of_lldpctl(text: str, found: Neighbours) -> None:
    assert parse_lldpctl(text) == found


@pytest.mark.parametrize(
    "text", ["", "{", "[]", '{"lldp": {"interface": [{"eth0": {"chassis": 3}}]}}', "null"]
)
def test_other_texts_are_named(text: str) -> None:
    with pytest.raises(BrokenError, match="known format"):
        parse_lldpctl(text)


def test_a_node_is_read(recorded: RecordedNode, config: Config) -> None:
    switches = {f"eth{number}": f"leaf{number}" for number in range(NUM_CARDS)}
    recorded.outputs["lldpctl -f json0"] = json0(switches | {"eno1": "oob-switch"})
    network = read_network(recorded.system, config.cluster.fabric)
    assert network.neighbours == {
        f"mlx5_{number}": Neighbour(switch=f"leaf{number}", port="swp17s0") for number in range(NUM_CARDS)
    }
    (alone,) = judge_all_rails({"a": network}, config.cluster).values()
    assert (alone.verdict, alone.found) == (
        Verdict.skipped, "no other node shares its switches, or none answers: nothing to compare with",
    )  # fmt: skip
    both = judge_all_rails({"a": network, "b": network}, config.cluster)
    assert both["b"].found == "8 cards on 8 switches, as on 1 other nodes"


@pytest.mark.parametrize(
    ("error", "words"),
    [
        (AbsentError("lldpctl is not installed"), "install lldpd"),
        (BrokenError("lldpctl: unable to get configuration: No such file or directory"), "unable to get"),
    ],
)
def test_without_lldpd_nothing_passes(
    recorded: RecordedNode, config: Config, error: Exception, words: str
) -> None:
    recorded.outputs["lldpctl"] = error
    network = read_network(recorded.system, config.cluster.fabric)
    (finding,) = judge_all_rails({"a": network}, config.cluster).values()
    assert finding.verdict is Verdict.skipped and words in finding.found
    (finding,) = judge_all_rails({"a": network}, compose(["experiment=smoke"]).cluster).values()
    assert "fabric is null" in finding.found


def plugged(unit: int, change: dict[int, str] | None = None) -> Neighbours:
    """Cards of a node of a unit, each on the leaf of its rail, except for `change`."""
    return {
        f"mlx5_{rail}": Neighbour(
            switch=(change or {}).get(rail, f"unit{unit}-leaf{rail}"), port=f"swp{rail}"
        )
        for rail in range(NUM_CARDS)
    }


def judged(nodes: dict[str, Neighbours | Missing]) -> dict[str, Finding]:
    """The nodes that do not pass."""
    findings = judge_rails(nodes, CARDS)
    return {node: one for node, one in findings.items() if one.verdict is not Verdict.passed}


def test_512_nodes_in_16_units_are_sound() -> None:
    """Units have other leafs; that is how fabrics are built."""
    assert judged({f"n{number}": plugged(number // 32) for number in range(512)}) == {}


def test_racks_with_one_switch_for_all_cards_are_sound() -> None:
    def rack(number: int) -> Neighbours:
        return {card: Neighbour(switch=f"rack{number}", port="swp1") for card in CARDS}

    assert judged({f"n{number}": rack(number // 4) for number in range(16)}) == {}


@pytest.mark.parametrize("num_nodes", [3, 32])
def test_exchanged_cables_are_named(num_nodes: int) -> None:
    exchanged = plugged(0, {2: "unit0-leaf3", 3: "unit0-leaf2"})
    found = judged({f"n{number}": plugged(0) for number in range(num_nodes)} | {"n1": exchanged})
    assert list(found) == ["n1"] and found["n1"].verdict is Verdict.warned
    assert (
        "mlx5_2 is on unit0-leaf3 port swp2, that of other nodes on unit0-leaf2; mlx5_3" in found["n1"].found
    )


def test_a_cable_into_another_unit_is_named() -> None:
    nodes: dict[str, Neighbours | Missing] = {f"n{number}": plugged(number // 32) for number in range(64)}
    found = judged(nodes | {"n40": plugged(1, {7: "unit0-leaf7"})})
    assert list(found) == ["n40"] and "mlx5_7 is on unit0-leaf7" in found["n40"].found


def test_of_two_nodes_neither_is_cleared() -> None:
    found = judged({"a": plugged(0), "b": plugged(0, {0: "unit0-leaf1", 1: "unit0-leaf0"})})
    assert [found[node].verdict for node in "ab"] == [Verdict.warned] * 2


def test_a_card_whose_switch_is_silent_does_not_pass() -> None:
    deaf = plugged(0)
    del deaf["mlx5_4"]
    nodes: dict[str, Neighbours | Missing] = {
        "a": plugged(0),
        "b": deaf,
        "c": {},
        "d": Missing(reason="no lldpd"),
    }
    found = judged(nodes)
    assert {node: one.verdict for node, one in found.items()} == dict.fromkeys("bcd", Verdict.skipped)
    assert "mlx5_4" in found["b"].found and "no switch on any card" in found["c"].found
