"""What preflight finds on network cards: addresses, speed, bonds, and cards in containers."""

import shutil

import pytest

from k25_train.compose.resolve import compose
from k25_train.config.schema import Config
from launch.preflight.findings import Verdict
from launch.preflight.hcas import read_hcas
from tests.helpers.recorded_node import (
    CARD,
    PORT,
    RecordedNode,
    change_output,
    examine,
)


@pytest.mark.parametrize(
    ("index", "verdict"), [(3, Verdict.passed), (1, Verdict.failed), (2, Verdict.failed)]
)
def test_a_fixed_gid_index_is_held_against_every_card(
    recorded: RecordedNode, index: int, verdict: Verdict
) -> None:
    """Rows 0 and 2 are RoCE v1, row 1 has a link-local address, which no switch routes."""
    config = compose(["experiment=k25_pretrain_4k", f"cluster.fabric.gid_index={index}"])
    (finding,) = [one for one in examine(recorded, config) if one.check == "RoCE v2 GID"]
    assert finding.verdict is verdict
    if verdict is Verdict.failed:
        assert f"cluster.fabric.gid_index is {index}" in finding.rule
        assert "mlx5_0: 3 (10.10.0.5)" in finding.found


@pytest.mark.parametrize(
    ("index", "family", "verdict"),
    [
        ("3", "ipv4", Verdict.passed),
        ("detect", "ipv4", Verdict.failed),
        ("3", "ipv6", Verdict.passed),
        ("detect", "ipv6", Verdict.passed),
    ],
)
def test_a_fabric_of_ipv6_needs_its_family_or_a_fixed_gid_index(
    recorded: RecordedNode, index: str, family: str, verdict: Verdict
) -> None:
    """NCCL searches only for addresses of the family that it is set to."""
    for number in range(8):
        for row, kind in ((2, "IB/RoCE v1"), (3, "RoCE v2")):
            recorded.write_gid(number, row, f"fd93:0016:d59a:0000:0000:0000:0a0a:{number:02x}05", kind)
    keys = [f"cluster.fabric.gid_index={index}", f"cluster.fabric.address_family={family}"]
    config = compose(["experiment=k25_pretrain_4k", *keys])
    (finding,) = [one for one in examine(recorded, config) if one.check == "RoCE v2 GID"]
    assert finding.verdict is verdict
    passed = "3 on all cards" if index == "3" else "mlx5_0: 3 (fd93:0016:d59a:0000:0000:0000:0a0a:0005)"
    assert finding.found.startswith(passed if verdict is Verdict.passed else "none on mlx5_0")


def test_cards_with_ipv4_only_do_not_fit_a_fabric_of_ipv6(recorded: RecordedNode) -> None:
    config = compose(["experiment=k25_pretrain_4k", "cluster.fabric.address_family=ipv6"])
    (finding,) = [one for one in examine(recorded, config) if one.check == "RoCE v2 GID"]
    assert finding.verdict is Verdict.failed and "a GID with an IPv6 address" in finding.rule


def test_cards_named_with_their_port_are_those_of_the_device(recorded: RecordedNode, config: Config) -> None:
    """In NCCL's notation; a port that is not there is missed under its own name."""
    hcas = ",".join(f"'mlx5_{number}:1'" for number in range(8))
    named = compose(["experiment=k25_pretrain_4k", f"cluster.fabric.hcas=[{hcas}]"])
    recorded.environment["NCCL_IB_HCA"] = "=" + hcas.replace("'", "")
    assert [one for one in examine(recorded, named) if one.verdict is not Verdict.passed] == []
    other = compose(["experiment=k25_pretrain_4k", "cluster.fabric.hcas=[mlx5_0,'mlx5_1:2']"])
    (finding,) = [one for one in examine(recorded, other) if one.check == "network cards"]
    assert finding.verdict is Verdict.failed and finding.found == "no mlx5_1:2"
    # A second port that is there is read instead of the first.
    for name, text in (("state", "4: ACTIVE"), ("link_layer", "Ethernet"), ("rate", "100 Gb/sec (4X EDR)")):
        recorded.write(f"sys/class/infiniband/mlx5_1/ports/2/{name}", f"{text}\n")
    second = read_hcas(recorded.system, other.cluster.fabric.cards)[1]
    assert (second.name, second.rate_gbps) == ("mlx5_1:2", 100.0)
    assert [hca.name for hca in read_hcas(recorded.system)][:2] == ["mlx5_0", "mlx5_1"]


def test_each_of_several_interfaces_must_be_up(recorded: RecordedNode) -> None:
    several = compose(["experiment=k25_pretrain_4k", "cluster.fabric.interface='bond0,eth0,eth99'"])
    (finding,) = [one for one in examine(recorded, several) if one.check == "interface"]
    assert finding.verdict is Verdict.failed and finding.found.startswith("eth99 is not up; up: bond0, ")


@pytest.mark.parametrize(
    ("mtu_bytes", "wanted", "verdict", "rule"),
    [
        (1500, "null", Verdict.warned, "RDMA packets of 4096 bytes need 4200"),
        (1500, "4200", Verdict.failed, "cluster.fabric.mtu_bytes is 4200"),
        (4200, "9000", Verdict.failed, "cluster.fabric.mtu_bytes is 9000"),
    ],
)
def test_packets_too_small_for_rdma_or_for_the_cluster_file(
    recorded: RecordedNode, mtu_bytes: int, wanted: str, verdict: Verdict, rule: str
) -> None:
    for number in range(8):
        recorded.write(f"sys/class/net/eth{number}/mtu", f"{mtu_bytes}\n")
    config = compose(["experiment=k25_pretrain_4k", f"cluster.fabric.mtu_bytes={wanted}"])
    (finding,) = [one for one in examine(recorded, config) if one.verdict is not Verdict.passed]
    assert (finding.check, finding.verdict) == ("network MTU", verdict)
    assert (finding.found, finding.rule) == (f"{mtu_bytes} bytes", rule)


def test_cards_too_slow_for_the_plan(recorded: RecordedNode) -> None:
    config = compose(["experiment=k25_pretrain_4k", "cluster.network_gb_per_s=60"])
    (finding,) = [one for one in examine(recorded, config) if one.verdict is not Verdict.passed]
    assert (finding.check, finding.verdict) == ("network speed", Verdict.failed)
    assert "400 GB/s per node" in finding.found
    assert "the plan needs 480 GB/s" in finding.rule


def test_a_bonded_card_has_the_speed_of_its_ports(recorded: RecordedNode, config: Config) -> None:
    """The kernel shows 200 Gb/s for each, one port's rate, and all are needed."""
    for number in range(8):
        recorded.bond_card(number)
    findings = examine(recorded, config)
    assert {one.verdict for one in findings} == {Verdict.passed}, "\n".join(map(str, findings))
    (finding,) = [one for one in findings if one.check == "network speed"]
    assert finding.found == "8 cards of 400 Gb/s, 400 GB/s per node"


def test_a_port_of_a_bonded_card_is_down(recorded: RecordedNode, config: Config) -> None:
    for number in range(8):
        recorded.bond_card(number)
    recorded.write("sys/class/net/eth2b/speed", "-1\n")
    (finding,) = [one for one in examine(recorded, config) if one.verdict is not Verdict.passed]
    assert (finding.check, finding.verdict) == ("network speed", Verdict.failed)
    assert "200 and 400 Gb/s" in finding.found
    assert "port of mlx5_2" in finding.remedy


def test_all_ports_of_a_bonded_card_are_looked_at(recorded: RecordedNode, config: Config) -> None:
    recorded.bond_card(2)
    texts = {start: str(recorded.outputs[start]) for start in ("mlnx_qos", "ethtool -S")}
    recorded.outputs = {
        "mlnx_qos -i eth2b": texts["mlnx_qos"].replace("state: dscp", "state: pcp"),
        "ethtool -S eth2b": texts["ethtool -S"],
        **recorded.outputs,
    }
    lose = change_output("ethtool -S eth2b", "rx_discards_phy: 0", "rx_discards_phy: 5")
    findings = examine(recorded, config, lambda: lose(recorded))
    found = {one.check: one.found for one in findings if one.verdict is not Verdict.passed}
    assert found == {
        "traffic class": "mlx5_2 eth2b takes the priority from pcp",
        "Ethernet loss": "mlx5_2 rx_discards_phy +5",
    }


def test_cards_bonded_as_interfaces_only_stay_two(recorded: RecordedNode) -> None:
    """The bond then carries TCP; each card has its own RDMA traffic."""
    recorded.bond_card(2)
    recorded.write("sys/class/net/eth2b/device/infiniband/mlx5_9/fw_ver", "28.39.1002\n")
    assert [card.interfaces for card in read_hcas(recorded.system)][2] == ("eth2",)


def test_a_card_split_for_virtual_machines(recorded: RecordedNode) -> None:
    """Its folder has an interface for the port of each function as well, under any name."""
    recorded.write(f"{CARD}/device/net/eth10/address", "5e:11:22:33:44:55\n")
    recorded.write("sys/class/net/eth10/phys_port_name", "pf0vf0\n")
    recorded.write("sys/class/net/eth2/phys_port_name", "p0\n")
    assert [card.interfaces for card in read_hcas(recorded.system)][2] == ("eth2",)


def test_a_container_with_an_interface_on_top_of_the_card(recorded: RecordedNode, config: Config) -> None:
    """The card's own is the host's (Kubernetes with macvlan): its rows hold zeros, or nothing readable."""
    shutil.rmtree(recorded.root / CARD / "device/net")
    for row in range(4):
        recorded.write(f"{PORT}/gids/{row}", "0000:0000:0000:0000:0000:0000:0000:0000\n")
    recorded.write_gid(2, 5, "0000:0000:0000:0000:0000:ffff:0a0a:0205", "RoCE v2")
    recorded.write(f"{PORT}/gid_attrs/ndevs/5", "net1\n")
    recorded.write("sys/class/net/net1/mtu", "9000\n")
    findings = [one for one in examine(recorded, config) if one.verdict is not Verdict.passed]
    # The switches of congestion control are those of the interface that the container does not see.
    assert [(one.check, one.verdict) for one in findings] == [("congestion control", Verdict.skipped)]


def test_a_card_that_is_not_there(recorded: RecordedNode) -> None:
    config = compose(["experiment=k25_pretrain_4k", "cluster.fabric.hcas=[mlx5_0,mlx5_9]"])
    bad = [one for one in examine(recorded, config) if one.verdict is Verdict.failed]
    assert "no mlx5_9" in bad[0].found
    assert "the node has mlx5_0, mlx5_1" in bad[0].remedy
