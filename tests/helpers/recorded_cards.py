"""The RoCE cards of a recorded node, as the kernel shows them in sysfs."""

import os
from pathlib import Path


class RecordedCards:
    """Files of a node, and those of its cards."""

    def __init__(self, root: Path) -> None:
        self.root = root

    def write(self, path: str, text: str) -> None:
        """Make a file of the node, or change it."""
        # Each of hundreds of tests makes hundreds of files: this takes a third of `write_text`'s time.
        file, flags = f"{self.root}/{path}", os.O_WRONLY | os.O_CREAT | os.O_TRUNC
        try:
            descriptor = os.open(file, flags, 0o644)
        except FileNotFoundError:
            os.makedirs(os.path.dirname(file), exist_ok=True)
            descriptor = os.open(file, flags, 0o644)
        os.write(descriptor, text.encode())
        os.close(descriptor)

    def write_card(self, number: int) -> None:
        """An active card of 400 Gb/s with its addresses: link-local and IPv4, each as RoCE v1 and v2."""
        card, net = f"sys/class/infiniband/mlx5_{number}", f"sys/class/net/eth{number}"
        port = f"{card}/ports/1"
        self.write(f"{net}/mtu", "9000\n")
        self.write(f"{net}/operstate", "up\n")
        self.write(f"{card}/device/net/eth{number}/address", "b8:3f:d2:12:34:56\n")
        self.write(f"{card}/device/numa_node", f"{number // 4}\n")
        self.write(f"{card}/fw_ver", "28.39.1002\n")
        self.write(f"{port}/state", "4: ACTIVE\n")
        self.write(f"{port}/phys_state", "5: LinkUp\n")
        self.write(f"{port}/rate", "400 Gb/sec (4X NDR)\n")
        self.write(f"{port}/link_layer", "Ethernet\n")
        self.write_pcie(f"{card}/device", f"0000:{0x19 + number:02x}:00.0")
        counters = {
            "counters/symbol_error": 0,
            "counters/link_downed": 1,
            "counters/port_xmit_data": 99999999,
        }
        counters |= {"hw_counters/packet_seq_err": 0, "hw_counters/out_of_sequence": 17}
        counters |= {f"hw_counters/{name}": 0 for name in ("rp_cnp_ignored", "rp_cnp_handled")}
        counters |= {"hw_counters/np_cnp_sent": 4, "hw_counters/np_ecn_marked_roce_packets": 9}
        for name, count in counters.items():
            self.write(f"{port}/{name}", f"{count}\n")
        self.write(f"{net}/carrier_changes", "3\n")
        for point in ("roce_np", "roce_rp"):
            for priority in (0, 3):
                self.write(f"{net}/ecn/{point}/enable/{priority}", f"{int(priority == 3)}\n")
        addresses = (
            "fe80:0000:0000:0000:ba3f:d2ff:fe12:3456",
            f"0000:0000:0000:0000:0000:ffff:0a0a:{number:02x}05",
        )
        for index in range(4):
            self.write_gid(number, index, addresses[index // 2], ("IB/RoCE v1", "RoCE v2")[index % 2])
        # Unused rows hold zeros.
        self.write(f"{port}/gids/4", "0000:0000:0000:0000:0000:0000:0000:0000\n")

    def write_pcie(self, folder: str, address: str, control: int = 0x5936) -> None:
        """The PCI side of a card, Gen5 x16; its capability with `control` is at 0x60, as a ConnectX's."""
        self.write(f"{folder}/uevent", f"DRIVER=mlx5_core\nPCI_CLASS=20000\nPCI_SLOT_NAME={address}\n")
        for name in ("current", "max"):
            self.write(f"{folder}/{name}_link_speed", "32.0 GT/s PCIe\n")
            self.write(f"{folder}/{name}_link_width", "16\n")
        config = bytearray(256)
        config[:8] = bytes.fromhex("b315211046051000")
        config[0x34], config[0x60], config[0x61] = 0x60, 0x10, 0x48
        config[0x48], config[0x49] = 0x03, 0x00
        config[0x68:0x6A] = control.to_bytes(2, "little")
        (self.root / folder / "config").write_bytes(config)

    def bond_card(self, number: int) -> None:
        """Make the card one of two bonded ports of 200 Gb/s; the driver keeps the first one's for both."""
        first, second = f"eth{number}", f"eth{number}b"
        self.write(f"sys/class/infiniband/mlx5_{number}/ports/1/rate", "200 Gb/sec (4X HDR)\n")
        for name in (first, second):
            self.write(f"sys/class/net/{name}/speed", "200000\n")
            self.write(f"sys/class/net/{name}/operstate", "up\n")
            self.write(f"sys/class/net/{name}/carrier_changes", "3\n")
            for point in ("roce_np", "roce_rp"):
                self.write(f"sys/class/net/{name}/ecn/{point}/enable/3", "1\n")
            # A link to the bond's folder.
            self.write(f"sys/class/net/{name}/master/bonding/mode", "802.3ad 4\n")
            self.write(f"sys/class/net/{name}/master/bonding/slaves", f"{first} {second}\n")
        self.write(f"sys/class/net/{first}/device/infiniband/mlx5_{number}/fw_ver", "28.39.1002\n")

    def write_gid(self, number: int, index: int, address: str, kind: str) -> None:
        """A row of a card's table of addresses."""
        port = f"sys/class/infiniband/mlx5_{number}/ports/1"
        self.write(f"{port}/gids/{index}", f"{address}\n")
        self.write(f"{port}/gid_attrs/types/{index}", f"{kind}\n")
        self.write(f"{port}/gid_attrs/ndevs/{index}", f"eth{number}\n")
