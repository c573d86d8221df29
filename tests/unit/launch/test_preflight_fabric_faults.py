"""Each fault of a node's cards, links and PCIe is named by one check, with what it is and what to do."""

from collections.abc import Callable

import pytest

from k25_train.config.schema import Config
from tests.helpers.node_faults import BAD, SKIPPED, SO_SO, Fault, assert_named, write
from tests.helpers.recorded_node import CARD, PORT, RecordedNode, change_output

Change = Callable[[RecordedNode], object]
NET = "sys/class/net/eth2"
NUM_CARDS = 8


def on_all(path: str, text: str) -> Change:
    """A function that writes a file of every card; `path` is that of the third."""

    def change(node: RecordedNode) -> None:
        for number in range(NUM_CARDS):
            own = path.replace("mlx5_2", f"mlx5_{number}").replace("eth2", f"eth{number}")
            node.write(own, text)

    return change


def requests(control: int, cards: range) -> Change:
    """A function that sets the Device Control register of cards."""

    def change(node: RecordedNode) -> None:
        for number in cards:
            folder = f"sys/class/infiniband/mlx5_{number}/device"
            node.write_pcie(folder, f"0000:{0x19 + number:02x}:00.0", control)

    return change


def hide_config(node: RecordedNode) -> None:
    """What others than root see of a card's configuration space."""
    for number in range(NUM_CARDS):
        file = node.root / f"sys/class/infiniband/mlx5_{number}/device/config"
        file.write_bytes(file.read_bytes()[:64])


def without_peer_memory(driver: str, kernel: str) -> Change:
    """A function that unloads nvidia-peermem, with another driver and kernel."""

    def change(node: RecordedNode) -> None:
        (node.root / "sys/module/nvidia_peermem/version").unlink()
        node.write("proc/driver/nvidia/version", driver)
        node.write("proc/sys/kernel/osrelease", kernel)

    return change


CLOSED = "NVRM version: NVIDIA UNIX x86_64 Kernel Module  580.95.05  Tue Mar  5 22:23:56 UTC 2024\n"
OPEN = CLOSED.replace("UNIX x86_64 Kernel Module", "UNIX Open Kernel Module for x86_64")

FAULTS = [
    # PCIe.
    Fault("PCIe of an older generation", write(f"{CARD}/device/current_link_speed", "16.0 GT/s PCIe\n"),
          "card PCIe link", BAD, ("mlx5_2: 16 GT/s x16 for 400 Gb/s", "reseat")),
    Fault("half of the lanes", write(f"{CARD}/device/current_link_width", "8\n"),
          "card PCIe link", BAD, ("mlx5_2: 32 GT/s x8 for 400 Gb/s",)),
    Fault("PCIe not shown", on_all(f"{CARD}/device/current_link_speed", "Unknown\n"),
          "card PCIe link", SKIPPED, ("all 8 cards are not shown",)),
    Fault("small reads", requests(0x2936, range(NUM_CARDS)),
          "card PCIe requests", SO_SO, ("MaxReadReq is 512 bytes on all 8 cards", "setpci")),
    Fault("small reads of one card", requests(0x2936, range(2, 3)),
          "card PCIe requests", SO_SO, ("512 bytes on mlx5_2",)),
    Fault("strict ordering", requests(0x5926, range(2, 4)),
          "card PCIe requests", SO_SO, ("relaxed ordering is off on mlx5_2, mlx5_3",)),
    Fault("not root", hide_config, "card PCIe requests", SKIPPED, ("only root", "all 8 cards")),
    # GPUDirect.
    Fault("no peer memory", without_peer_memory(CLOSED, "5.15.0-105-generic"),
          "GPUDirect RDMA", BAD, ("no dma-buf", "modprobe nvidia-peermem")),
    Fault("open modules on an old kernel", without_peer_memory(OPEN, "5.4.0-150-generic"),
          "GPUDirect RDMA", BAD, ("kernel 5.4.0-150-generic",)),
    Fault("driver not shown", without_peer_memory("", "6.8.0-60-generic"),
          "GPUDirect RDMA", SKIPPED, ("not shown",)),
    # Buffers of the lossless priority.
    Fault("no buffer", change_output("mlnx_qos", "19872,243072,", "262944,0,"),
          "receive buffers", BAD, ("no bytes on all 8 cards", "--prio2buffer")),
    Fault("shared buffer",
          change_output("mlnx_qos", "buffer      0   0   0   1   0   0", "buffer      1   0   0   1   0   0"),
          "receive buffers", SO_SO, ("lossy priorities use", "all 8 cards")),
    Fault("no buffers shown",
          change_output("mlnx_qos", "Receive buffer size (bytes): 19872,243072,0,0,0,0,0,0,\n", ""),
          "receive buffers", SKIPPED, ("not shown",)),
    # Links.
    Fault("a link that flaps", write(f"{NET}/carrier_changes", "161\n"),
          "link flaps", SO_SO, ("mlx5_2 was down 80 times", "up for 30.0 days", "transceiver")),
    Fault("a link that flapped, by its own counter", write(f"{PORT}/counters/link_downed", "255\n"),
          "link flaps", SO_SO, ("mlx5_2 was down 255 times",)),
    Fault("a link that goes down while measuring", lambda node: None, "link flaps", BAD,
          ("while measuring: mlx5_2 link_downed +1",), write(f"{PORT}/counters/link_downed", "2\n")),
    Fault("a carrier that is lost while measuring", lambda node: None, "link flaps", BAD,
          ("while measuring: mlx5_2 carrier_losses +1",), write(f"{NET}/carrier_changes", "5\n")),
    Fault("errors after correction", lambda node: None, "bit errors", SO_SO,
          ("mlx5_2 symbol_error +3",), write(f"{PORT}/counters/symbol_error", "3\n")),
    Fault("many errors after correction", lambda node: None, "bit errors", BAD,
          ("rx_symbol_err_phy +40",), change_output("ethtool -S", "symbol_err_phy: 0", "symbol_err_phy: 40")),
    Fault("packets with a wrong checksum", lambda node: None, "bit errors", SO_SO,
          ("rx_crc_errors_phy +1",), change_output("ethtool -S", "crc_errors_phy: 0", "crc_errors_phy: 1")),
    Fault("a bad cable by mlxlink",
          change_output("mlxlink", 'Physical BER": "15E-255"', 'Physical BER": "3E-9"'),
          "bit errors", SO_SO, ("bit error rate 3e-09", "1e-12")),
    Fault("nearly too many errors",
          change_output("ethtool -S", "corrected_bits_phy: 20736", "corrected_bits_phy: 103680000"),
          "bit errors", SO_SO, ("before correction", "2.4e-4")),
    Fault("no error correction", change_output("ethtool --show-fec", "encoding: RS", "encoding: Off"),
          "error correction", SO_SO, ("off on all 8 cards", "--set-fec")),
    Fault("error correction unknown", change_output("ethtool --show-fec", "Active FEC encoding: RS\n", ""),
          "error correction", SKIPPED, ("all 8 cards", "names no active encoding")),
    # Congestion control.
    Fault("no notifications", write(f"{NET}/ecn/roce_np/enable/3", "0\n"),
          "congestion control", SO_SO, ("answering marks (roce_np) is off on mlx5_2", "roce_rp/enable")),
    Fault("nobody slows down", on_all(f"{NET}/ecn/roce_rp/enable/3", "0\n"),
          "congestion control", SO_SO, ("slowing down (roce_rp) is off on all 8 cards",)),
    Fault("marks that nobody answers", lambda node: None, "congestion control", SO_SO,
          ("mlx5_2 received marked packets, and answered none",),
          write(f"{PORT}/hw_counters/np_ecn_marked_roce_packets", "900\n")),
    Fault("ignored notifications", lambda node: None, "congestion control", SO_SO, ("ignored notifications",),
          write(f"{PORT}/hw_counters/rp_cnp_ignored", "12\n")),
    # Loss.
    Fault("retransmissions", lambda node: None, "RDMA loss", SO_SO, ("mlx5_2 local_ack_timeout_err +2",),
          write(f"{PORT}/hw_counters/local_ack_timeout_err", "2\n")),
]  # fmt: skip


@pytest.mark.parametrize("fault", FAULTS, ids=lambda fault: fault.name)
def test_a_fault_is_named(fault: Fault, recorded: RecordedNode, config: Config) -> None:
    recorded.write(f"{PORT}/hw_counters/local_ack_timeout_err", "0\n")
    assert_named(fault, recorded, config)
