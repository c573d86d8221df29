"""Addresses of network cards: rows of their GID tables, and the check that RoCE v2 has the one it needs."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from k25_train.config.fabric import DETECT, AddressFamily, FabricConfig
from launch.preflight.findings import Finding, failed, passed

ROCE_V2 = "RoCE v2"
GID = "RoCE v2 GID"


@dataclass(frozen=True, slots=True, kw_only=True)
class Gid:
    """An address of a port, which is a row of its GID table."""

    index: int
    address: str
    kind: str
    """`RoCE v2`, `IB/RoCE v1` or another type as named by the kernel."""
    interface: str
    """Network interface that has the address; empty on InfiniBand."""

    @property
    def is_routable_v2(self) -> bool:
        """Whether it is RoCE v2 with a routable address, which a link-local one is not."""
        return self.kind == ROCE_V2 and not self.address.startswith("fe80:")

    @property
    def ipv4(self) -> str:
        """The IPv4 address that is mapped to it; empty for an IPv6 address."""
        if not self.address.startswith("0000:0000:0000:0000:0000:ffff:"):
            return ""
        digits = self.address.replace(":", "")[-8:]
        return ".".join(str(int(digits[at : at + 2], 16)) for at in range(0, 8, 2))


def judge_gids(routable: Mapping[str, Sequence[Gid]], fabric: FabricConfig) -> Finding:
    """Check that every card (name -> its routable rows) has the row that NCCL will use."""
    check, gid_index = GID, fabric.gid_index
    detects, wants_ipv4 = gid_index == DETECT, fabric.address_family is AddressFamily.ipv4
    # NCCL searches for rows with an address of the family; a fixed index may refer to any row.
    usable = {
        name: [gid for gid in gids if bool(gid.ipv4) == wants_ipv4 or not detects]
        for name, gids in routable.items()
    }
    without = [name for name, gids in usable.items() if not gids]
    if without:
        version = "IPv4" if wants_ipv4 else "IPv6"
        rule = f"RoCE v2 needs a GID with {f'an {version}' if detects else 'a routable'} address"
        remedy = f"give the interface an {version} address and bring it up; drain the node"
        return failed(check, f"none on {', '.join(without)}", rule, remedy)
    found = ", ".join(
        f"{name}: {gids[0].index} ({gids[0].ipv4 or gids[0].address})" for name, gids in usable.items()
    )
    if detects:
        return passed(check, found)
    wrong = [name for name, gids in usable.items() if gid_index not in [gid.index for gid in gids]]
    if wrong:
        rule = f"cluster.fabric.gid_index is {gid_index}, which is not usable on {', '.join(wrong)}"
        return failed(check, found, rule, "correct it, or let NCCL find it: cluster.fabric.gid_index=detect")
    return passed(check, f"{gid_index} on all cards")
