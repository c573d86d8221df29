"""What preflight finds of packet loss: counters that grow while measuring, and the traffic class."""

import pytest

from k25_train.config.schema import Config
from launch.preflight.counters import MANY_LOST, Counters, judge_loss
from launch.preflight.findings import Verdict
from launch.preflight.system import BrokenError
from tests.helpers.recorded_node import CARD, PORT, RecordedNode, change_output, examine


def test_counters_that_grow_while_measuring(recorded: RecordedNode, config: Config) -> None:
    def lose() -> None:
        recorded.write(f"{PORT}/hw_counters/packet_seq_err", "7\n")

    (finding,) = [one for one in examine(recorded, config, lose) if one.verdict is not Verdict.passed]
    assert finding.check == "RDMA loss"
    assert "mlx5_2 packet_seq_err +7" in finding.found


def test_rdma_counters_without_those_of_the_port(recorded: RecordedNode, config: Config) -> None:
    recorded.outputs["ethtool -S"] = BrokenError("ethtool -S net1: status 94: no stats available")

    def lose() -> None:
        recorded.write(f"{PORT}/hw_counters/packet_seq_err", "7\n")

    bad = {one.check: one for one in examine(recorded, config, lose) if one.verdict is not Verdict.passed}
    rdma = bad.pop("RDMA loss")
    assert (rdma.verdict, rdma.found) == (Verdict.warned, "mlx5_2 packet_seq_err +7")
    assert {check: one.verdict for check, one in bad.items()} == dict.fromkeys(
        ("Ethernet loss", "bit errors"), Verdict.skipped
    )
    assert all("no stats available" in one.found for one in bad.values())


@pytest.mark.parametrize(("lost", "verdict"), [(MANY_LOST - 1, Verdict.warned), (MANY_LOST, Verdict.failed)])
def test_a_few_lost_packets_warn_and_many_fail(lost: int, verdict: Verdict) -> None:
    def counters(count: int) -> Counters:
        counts = {"packet_seq_err": count, "rx_discards_phy": 0}
        return Counters(uptime_s=1.0, counts={"mlx5_0": counts}, unread={})

    rdma, ethernet = judge_loss(counters(5), counters(5 + lost))
    assert (rdma.verdict, rdma.found) == (verdict, f"mlx5_0 packet_seq_err +{lost}")
    assert ethernet.verdict is Verdict.passed


@pytest.mark.parametrize("name", ["rx_prio3_buf_discard", "rx_prio3_cong_discard", "tx_discards"])
def test_what_the_port_counts_while_measuring(recorded: RecordedNode, config: Config, name: str) -> None:
    """RDMA's own counters have no packets dropped for want of buffers."""
    recorded.outputs["ethtool -S"] = f"{recorded.outputs['ethtool -S']}     {name}: 2\n"
    lose = change_output("ethtool -S", f"{name}: 2", f"{name}: 3")
    (finding,) = [
        one for one in examine(recorded, config, lambda: lose(recorded)) if one.verdict is not Verdict.passed
    ]
    assert finding.check == "Ethernet loss"
    assert f"mlx5_0 {name} +1" in finding.found


def test_pauses_are_no_loss(recorded: RecordedNode, config: Config) -> None:
    """A full receiver pauses its sender; that is what the priority is for."""
    pause = change_output("ethtool -S", "rx_prio3_pause: 5120", "rx_prio3_pause: 5130")
    findings = examine(recorded, config, lambda: pause(recorded))
    (finding,) = [one for one in findings if one.check == "Ethernet loss"]
    assert (finding.verdict, finding.found) == (Verdict.passed, "none while measuring, 80 pause frames")


@pytest.mark.parametrize("forced", ["", "Global tclass=106\n"])
def test_a_traffic_class_for_single_addresses_forces_none(
    recorded: RecordedNode, config: Config, forced: str
) -> None:
    """The driver lists such rules below the class that it forces upon all connections, or alone."""
    rules = "src_ip=10.9.0.5,dst_ip=10.9.0.0/24,tclass=160\ndst_ip=10.9.1.7/32,tclass=32\n"
    recorded.write(f"{CARD}/tc/1/traffic_class", forced + rules)
    findings = examine(recorded, config)
    assert {one.verdict for one in findings} == {Verdict.passed}, "\n".join(map(str, findings))
