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
from collections.abc import Iterable
from pathlib import Path

from k25_train.entry import run_command
from k25_train.errors import K25Error
from k25_train.joining import network
from k25_train.joining.network import NetworkError
from launch import started_by

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
        try:
            network.resolve(socket.gethostname())
        except NetworkError as error:
            raise RendezvousError(
                f"{error}, but it is the name at which the other nodes look for this machine: add it to DNS "
                "or /etc/hosts, or name the network interface to use (cluster.fabric.interface)"
            ) from error
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


def is_free(port: int) -> bool:
    """Whether nothing listens on a TCP port of this host."""
    try:
        network.listen(port).close()
    except NetworkError:
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
    """Return as soon as something listens at the address and port; tells every few seconds what it waits
    for.

    Raises `RendezvousError` if the name does not resolve, or after `timeout_s` with the last error.
    """
    try:
        network.wait_for(address, port, timeout_s, f"{socket.gethostname()} waits for the first node's ranks")
    except NetworkError as error:
        raise RendezvousError(
            f"{error}: check whether the first node's ranks started (its node_<NODE>.log), whether a "
            f"firewall closes the port, and whether every node can reach {address} (cluster.fabric.interface)"
        ) from error


def main() -> None:
    """Print the address and port at which this node's ranks can be reached."""
    run_command(_run)


def _run() -> None:
    first_port, *where = started_by.arguments("FIRST_PORT ...")
    first = started_by.count("FIRST_PORT", first_port)
    address = address_of(*where) if where else address_of(None)
    port = free_port(range(first, first + NUM_PORTS))
    print(json.dumps({"address": address, "port": str(port)}))


if __name__ == "__main__":
    main()
