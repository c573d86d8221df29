"""The network between the machines of a job: RDMA over converged Ethernet."""

from dataclasses import dataclass
from enum import Enum

from k25_train.config.forms import HCA, INTERFACES, NCCL_INTERFACES, repeated
from parallel.config import Problem

DETECT = "detect"
"""Value of `gid_index` with which NCCL finds the index of each HCA itself."""


class AddressFamily(Enum):
    """Version of IP between the machines of a job."""

    ipv4 = "ipv4"
    ipv6 = "ipv6"


@dataclass(frozen=True, slots=True)
class Card:
    """A port of an RDMA device."""

    device: str
    port: int


@dataclass(slots=True, kw_only=True)
class FabricConfig:
    """The network between GPUs: RDMA over converged Ethernet. NCCL's variables follow from it."""

    interface: str
    """Network interface, the same on every node, over which ranks find each other and gloo talks; or several,
    separated by commas: gloo and NCCL's sockets use all of them, the rendezvous the first."""
    nccl_interfaces: str | None
    """Interfaces of NCCL's sockets in the notation of NCCL_SOCKET_IFNAME (`^docker,lo`, `=ens1f0,ens1f1`, or
    prefixes), where they differ; null is exactly those of `interface`."""
    address_family: AddressFamily
    """Version of IP of the rendezvous, of NCCL's sockets and of the RoCEv2 addresses. gloo has no such
    choice: it takes the first address of `interface`, which is of IPv4 if there is one."""
    hcas: list[str]
    """RDMA devices that carry training, one per GPU, as DEVICE or DEVICE:PORT; without a port NCCL uses all
    of them, and preflight reads the first. Storage and management devices are left out."""
    gid_index: int | str
    """Row of each device's GID table that holds its RoCEv2 address, or `detect`: then NCCL searches it for
    every device, as rows differ between nodes and change when addresses do."""
    traffic_class: int
    """Traffic class of packets, 0 to 255: the DSCP times 4 of the switches' lossless queue."""
    ack_timeout: int
    """Local ACK timeout exponent, 1 to 31: a packet is sent again after 4.096 us x 2^n."""
    retries: int
    """Times a packet is sent again before the connection fails, 0 to 7."""
    mtu_bytes: int | None
    """MTU that the interfaces of all devices must have at least, which preflight checks; null warns of those
    in which RDMA packets of 4096 bytes, the largest, do not fit."""

    @property
    def interfaces(self) -> list[str]:
        """The interfaces of `interface`."""
        return self.interface.split(",")

    @property
    def cards(self) -> list[Card]:
        """The ports of `hcas`."""
        pairs = (hca.partition(":") for hca in self.hcas)
        return [Card(device, int(port or 1)) for device, _, port in pairs]

    def problems(self) -> list[Problem]:
        """Every rule of this section that is broken."""
        # 1. Names.
        found = INTERFACES.misfits([("interface", self.interface)])
        found += NCCL_INTERFACES.misfits([("nccl_interfaces", self.nccl_interfaces)])
        found += HCA.misfits((f"hcas.{i}", hca) for i, hca in enumerate(self.hcas))
        if not self.hcas:
            found.append(
                Problem("hcas", "[]", "must name a device", "list those of `ibv_devices`, one per GPU")
            )
        if not found:
            ports = [f"{card.device}:{card.port}" for card in self.cards]
            for key, names in (("interface", self.interfaces), ("hcas", ports)):
                twice = ", ".join(repeated(names))
                if twice:
                    found.append(Problem(key, twice, "must be named once", "leave the second one out"))
        # 2. Numbers.
        is_row = (
            isinstance(self.gid_index, int)
            and not isinstance(self.gid_index, bool)
            and 0 <= self.gid_index <= 255
        )
        if not is_row and self.gid_index != DETECT:
            rule = f"must be a row of the GID table, 0 to 255, or {DETECT}"
            found.append(Problem("gid_index", self.gid_index, rule, "`show_gids` lists RoCEv2 rows"))
        limits = (("traffic_class", 0, 255), ("ack_timeout", 1, 31), ("retries", 0, 7))
        for name, least, most in limits:
            number = getattr(self, name)
            if not least <= number <= most:
                rule = f"must lie within {least} to {most}"
                found.append(Problem(name, number, rule, "ask who runs the switches"))
        if self.mtu_bytes is not None and not 1280 <= self.mtu_bytes <= 65535:
            rule = "must lie within 1280 to 65535, or be null"
            found.append(Problem("mtu_bytes", self.mtu_bytes, rule, "9000 is what most fabrics have"))
        return found
