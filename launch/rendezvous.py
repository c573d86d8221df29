"""Where the ranks of a job meet: an address and a free port of the first node, found on that node.

What the submitting side could guess is often wrong: SLURM_LAUNCH_NODE_IPADDR is the login node's address,
node names need not resolve, and a fixed port may be taken by another job.

    python -m launch.rendezvous FIRST_PORT [INTERFACE FAMILY]    prints {"address": …, "port": …}
"""

import fcntl
import ipaddress
import json
import socket
import struct
import sys
import time
from collections.abc import Iterable
from pathlib import Path

from k25_train.entry import run_command
from k25_train.errors import K25Error

NUM_PORTS = 100
"""Ports that are tried."""
JOIN_S = 300.0
"""Longest time that a node waits for the first one to open the rendezvous; imports take seconds, or minutes
on a cold file system."""
_SIOCGIFADDR = 0x8915
"""Linux's ioctl request for the IPv4 address of an interface."""
IPV4, IPV6 = "ipv4", "ipv6"
"""Values of `cluster.fabric.address_family`."""
_ADDRESSES = Path("/proc/net/if_inet6")
"""The kernel's list of IPv6 addresses: digits, index, length of the prefix, scope, flags and interface."""
_LINK_LOCAL, _SITE_LOCAL = 0x20, 0x40
"""Scopes whose addresses other nodes cannot use as they are."""
_UNUSABLE = 0x08 | 0x20 | 0x40
"""Flags of an address that is a duplicate, deprecated, or not yet known to be unique."""


class RendezvousError(K25Error):
    """Ranks cannot find each other."""


def address_of(interface: str | None, family: str = IPV4) -> str:
    """Address of an interface, of the given version of IP; this host's name if `interface` is None.

    Raises `RendezvousError`, which names the interfaces that exist, if it has no address.
    """
    if interface is None:
        return socket.gethostname()
    if family == IPV6:
        return _ipv6_address_of(interface)
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as any_socket:
        try:
            request = struct.pack("256s", interface.encode()[:15])
            return socket.inet_ntoa(fcntl.ioctl(any_socket, _SIOCGIFADDR, request)[20:24])
        except OSError as error:
            raise _no_address(interface, "an IPv4 address", error.strerror or str(error)) from error


def _ipv6_address_of(interface: str) -> str:
    """The interface's IPv6 address that other nodes can use: a link-local one means another on each node."""
    found = _ADDRESSES.read_text(encoding="ascii").splitlines() if _ADDRESSES.exists() else []
    for digits, _index, _length, scope, flags, name in map(str.split, found):
        usable = int(scope, 16) not in (_LINK_LOCAL, _SITE_LOCAL) and not int(flags, 16) & _UNUSABLE
        if name == interface and usable:
            return str(ipaddress.IPv6Address(int(digits, 16)))
    names = sorted({line.split()[-1] for line in found})
    has = f"IPv6 addresses are on {', '.join(names)}" if names else "IPv6 is off"
    raise _no_address(interface, "an IPv6 address beyond the link", has)


def _no_address(interface: str, what: str, why: str) -> RendezvousError:
    names = ", ".join(name for _, name in socket.if_nameindex())
    return RendezvousError(
        f"cluster.fabric.interface={interface}: {socket.gethostname()} has no such interface with {what} "
        f"({why}); it has {names}"
    )


def endpoint(address: str, port: int) -> str:
    """Address and port in one text, with an IPv6 address in brackets."""
    return f"[{address}]:{port}" if ":" in address else f"{address}:{port}"


def is_free(port: int) -> bool:
    """Whether nothing listens on a TCP port of this host."""
    with socket.socket(socket.AF_INET6 if socket.has_dualstack_ipv6() else socket.AF_INET) as listener:
        # As torch's store does: otherwise a port whose last connection has just closed counts as taken.
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            listener.bind(("", port))
            listener.listen()
        except OSError:
            return False
    return True


def free_port(candidates: Iterable[int]) -> int:
    """The first free port. Raises `RendezvousError` if there is none."""
    candidates = list(candidates)
    for port in candidates:
        if is_free(port):
            return port
    raise RendezvousError(
        f"every port from {candidates[0]} to {candidates[-1]} of {socket.gethostname()} is taken: set "
        "cluster.slurm.rendezvous_port to the start of a free range"
    )


def wait_for(address: str, port: int, timeout_s: float = JOIN_S) -> None:
    """Return as soon as something listens at the address and port.

    Raises `RendezvousError` after `timeout_s`, with the last connection error.
    """
    deadline = time.monotonic() + timeout_s
    while True:
        try:
            with socket.create_connection((address, port), timeout=5.0):
                return
        except OSError as error:
            trouble = error
        if time.monotonic() >= deadline:
            raise RendezvousError(
                f"{socket.gethostname()} cannot reach the rendezvous at {endpoint(address, port)} "
                f"({trouble}) after {timeout_s:g} s: check whether the first node's ranks started (its "
                "node_<NODE>.log), whether a firewall closes the port, and whether every node can reach "
                f"{address} (cluster.fabric.interface)"
            )
        time.sleep(0.2)


def main() -> None:
    """Print the address and port at which this node's ranks can be reached."""
    run_command(_run)


def _run() -> None:
    first_port, *where = sys.argv[1:]
    address = address_of(*where) if where else address_of(None)
    port = free_port(range(int(first_port), int(first_port) + NUM_PORTS))
    print(json.dumps({"address": address, "port": str(port)}))


if __name__ == "__main__":
    main()
