"""What of the network cannot be read is skipped with its reason; other tools and drivers say the same."""

import shutil
from pathlib import Path

import pytest

from k25_train.compose.resolve import compose
from k25_train.config.schema import Config
from launch.preflight.findings import Verdict
from launch.preflight.network import NETWORK_CHECKS
from launch.preflight.system import AbsentError, BrokenError
from tests.helpers.node_faults import BAD, SKIPPED
from tests.helpers.recorded_node import PORT, RecordedNode, change_output, examine

NUM_CARDS = 8
NO_TOOL = AbsentError("ethtool is not installed")


def test_without_ethtool_its_counters_are_not_said_to_be_sound(
    recorded: RecordedNode, config: Config
) -> None:
    """RDMA's own counters are judged; Ethernet's, and what only they know, are skipped with the remedy."""
    for start in ("ethtool --show-fec", "ethtool -S"):
        recorded.outputs[start] = NO_TOOL
    bad = {one.check: one for one in examine(recorded, config) if one.verdict is not Verdict.passed}
    assert {check: one.verdict for check, one in bad.items()} == dict.fromkeys(
        ("Ethernet loss", "bit errors", "error correction"), SKIPPED
    )
    assert "ethtool is not installed: install it" in bad["Ethernet loss"].found
    assert "all 8 cards" in bad["Ethernet loss"].found


def test_one_card_without_counters_does_not_pass_with_the_others(
    recorded: RecordedNode, config: Config
) -> None:
    recorded.outputs = {"ethtool -S eth2": BrokenError("no stats available"), **recorded.outputs}
    for name in ("rp_cnp_handled", "packet_seq_err"):
        (recorded.root / PORT / "hw_counters" / name).unlink()
    bad = {one.check: one for one in examine(recorded, config) if one.verdict is not Verdict.passed}
    assert {check: one.verdict for check, one in bad.items()} == dict.fromkeys(
        ("Ethernet loss", "RDMA loss", "bit errors"), SKIPPED
    )
    assert "mlx5_2: no stats available" in bad["Ethernet loss"].found


@pytest.mark.parametrize("has_other_cards", [True, False])
def test_without_the_cards_nothing_of_them_passes(tmp_path: Path, has_other_cards: bool) -> None:
    """The traffic class used to be on an empty list of lossless priorities, and to pass."""
    config = compose(["experiment=k25_pretrain_4k", "cluster.fabric.hcas=[roce0,roce1]"])
    node = RecordedNode(tmp_path)
    if not has_other_cards:
        shutil.rmtree(node.root / "sys/class/infiniband")
    found = {one.check: one for one in examine(node, config)}
    of_cards = [check for check in NETWORK_CHECKS if check not in ("network cards", "GPUDirect RDMA")]
    assert found["network cards"].verdict is Verdict.failed
    assert {found[check].verdict for check in of_cards} == {SKIPPED}


def test_without_mlnx_qos_the_kernel_is_asked(recorded: RecordedNode, config: Config) -> None:
    """Output of iproute2 6.1's dcb on a card of the kernel's own driver."""
    recorded.outputs["mlnx_qos"] = AbsentError("mlnx_qos is not installed")
    pfc = "pfc-cap 8 macsec-bypass off delay 0 \nprio-pfc 0:off 1:off 2:off 3:on 4:off 5:off 6:off 7:off \n"
    recorded.outputs["dcb -N app"] = "dscp-prio 26:3 48:6 \n"
    recorded.outputs["dcb -N pfc"] = pfc
    recorded.outputs["dcb buffer"] = BrokenError("dcb buffer show dev eth0: status 1: Attribute not found")
    found = {one.check: one for one in examine(recorded, config)}
    assert found["traffic class"].found == "106 is DSCP 26, on lossless priority 3"
    assert found["receive buffers"].verdict is SKIPPED
    recorded.outputs["dcb buffer"] = (
        "prio-buffer 0:0 1:0 2:0 3:1 4:0 5:0 6:0 7:0 \n"
        "buffer-size 0:20016b 1:237Kb 2:0b 3:0b 4:0b 5:0b 6:0b 7:0b \ntotal-size 262016b \n"
    )
    found = {one.check: one for one in examine(recorded, config)}
    assert found["receive buffers"].found == "242,688 bytes, not shared"
    recorded.outputs["dcb -N app"] = ""
    found = {one.check: one for one in examine(recorded, config)}
    assert found["traffic class"].verdict is Verdict.failed
    assert "takes the priority from pcp" in found["traffic class"].found
    recorded.outputs["dcb -N app"], recorded.outputs["dcb -N pfc"] = (
        "dscp-prio 26:3",
        pfc.replace("on", "off"),
    )
    assert "flow control is on []" in next(
        one.found for one in examine(recorded, config) if one.check == "traffic class"
    )


def test_the_kernels_driver_shows_congestion_control_at_work_alone(
    recorded: RecordedNode, config: Config
) -> None:
    """It has no switches in sysfs; notifications that were sent show that it is on."""
    for number in range(NUM_CARDS):
        shutil.rmtree(recorded.root / f"sys/class/net/eth{number}/ecn")
    (finding,) = [one for one in examine(recorded, config) if one.check == "congestion control"]
    assert finding.verdict is SKIPPED and "/sys/class/net/INTERFACE/ecn" in finding.found

    def congest() -> None:
        recorded.write(f"{PORT}/hw_counters/np_ecn_marked_roce_packets", "900\n")
        recorded.write(f"{PORT}/hw_counters/np_cnp_sent", "80\n")

    (finding,) = [one for one in examine(recorded, config, congest) if one.check == "congestion control"]
    assert finding.verdict is Verdict.passed and "np_cnp_sent +76" in finding.found


def test_counters_under_broadcoms_names(recorded: RecordedNode, config: Config) -> None:
    """ethtool -S of bnxt_en, and the counters of bnxt_re."""
    recorded.outputs["ethtool -S"] = (
        "NIC statistics:\n     rx_fcs_err_frames: 0\n     rx_pfc_ena_frames_pri3: 7\n     rx_discards: 0\n"
        "     rx_pcs_symbol_err: 0\n     rx_corrected_bits: 20736000000\n     link_down_events: 1\n"
    )
    for number in range(NUM_CARDS):
        counters = recorded.root / f"sys/class/infiniband/mlx5_{number}/ports/1/hw_counters"
        (counters / "packet_seq_err").rename(counters / "to_retransmits")
    findings = examine(recorded, config)
    assert {one.verdict for one in findings} == {Verdict.passed}, "\n".join(map(str, findings))

    def lose() -> None:
        recorded.write(f"{PORT}/hw_counters/to_retransmits", "150\n")

    (finding,) = [one for one in examine(recorded, config, lose) if one.verdict is not Verdict.passed]
    assert (finding.check, finding.verdict, finding.found) == ("RDMA loss", BAD, "mlx5_2 to_retransmits +150")


def test_counters_that_a_driver_reset_are_not_compared(recorded: RecordedNode, config: Config) -> None:
    for number in range(NUM_CARDS):
        port = f"sys/class/infiniband/mlx5_{number}/ports/1"
        recorded.write(f"{port}/hw_counters/packet_seq_err", "9\n")
        recorded.write(f"{port}/hw_counters/implied_nak_seq_err", "0\n")

    def reset() -> None:
        recorded.write(f"{PORT}/hw_counters/packet_seq_err", "0\n")

    (finding,) = [one for one in examine(recorded, config, reset) if one.verdict is not Verdict.passed]
    assert (finding.check, finding.verdict) == ("RDMA loss", SKIPPED)


def test_raw_errors_are_rated_by_the_time_that_they_took(recorded: RecordedNode, config: Config) -> None:
    """8e9 bits corrected in 20 s of 400 Gb/s are 1e-3, although few since boot."""

    def correct() -> None:
        recorded.write("proc/uptime", f"{30 * 86400 + 20}.25 9999999.00\n")
        change_output("ethtool -S", "rx_corrected_bits_phy: 20736", "rx_corrected_bits_phy: 28736")(recorded)

    (finding,) = [one for one in examine(recorded, config, correct) if one.verdict is not Verdict.passed]
    assert finding.check == "bit errors" and "1e-03 before correction" in finding.found


def test_a_virtual_function_says_nothing_of_its_requests(recorded: RecordedNode, config: Config) -> None:
    for number in range(NUM_CARDS):
        device = f"sys/class/infiniband/mlx5_{number}/device"
        recorded.write_pcie(device, "0000:19:00.2", control=0)
        recorded.write(f"{device}/physfn/uevent", "DRIVER=mlx5_core\n")
    (finding,) = [one for one in examine(recorded, config) if one.verdict is not Verdict.passed]
    assert (finding.check, finding.verdict) == ("card PCIe requests", SKIPPED)
    assert "virtual functions" in finding.found
