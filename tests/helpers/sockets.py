"""Which TCP sockets a process listens on, read from /proc."""

import ipaddress
import os
import struct
from pathlib import Path

_LISTEN = "0A"


def listening_addresses(pid: int | str = "self") -> set[tuple[str, int]]:
    """Address and port of every TCP socket that a process listens on; `::` is all addresses."""
    inodes = {_inode(link) for link in Path(f"/proc/{pid}/fd").iterdir()} - {""}
    found = set()
    for table in ("tcp", "tcp6"):
        for line in Path(f"/proc/{pid}/net/{table}").read_text().splitlines()[1:]:
            fields = line.split()
            if fields[3] == _LISTEN and fields[9] in inodes:
                address, port = fields[1].split(":")
                found.add((_address(address), int(port, 16)))
    return found


def _inode(link: Path) -> str:
    """Inode of an open socket; empty for what is none."""
    try:
        target = os.readlink(link)
    except OSError:
        return ""
    return target[len("socket:[") : -1] if target.startswith("socket:[") else ""


def _address(text: str) -> str:
    """The kernel prints words of four bytes in the machine's order."""
    words = [struct.pack("=I", int(text[at : at + 8], 16)) for at in range(0, len(text), 8)]
    return str(ipaddress.ip_address(b"".join(words)))


def is_loopback(address: str) -> bool:
    """Whether only this host reaches the address."""
    found = ipaddress.ip_address(address)
    mapped = getattr(found, "ipv4_mapped", None)
    return (mapped or found).is_loopback
