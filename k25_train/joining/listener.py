"""Where the store of a job listens: at the address by which its ranks look for it, instead of everywhere.

torch's store takes values from whoever reaches its port, and torch reads some of them as pickles.
"""

import ipaddress
import socket
import sys

from k25_train.joining.network import NetworkError, own_name


def listen_at(address: str, port: int, *, is_alone: bool) -> socket.socket:
    """A listening socket on one address of this host.

    Args:
        address: name or address by which the ranks find the store.
        port: its port.
        is_alone: whether all ranks are on this host.

    Raises `NetworkError` if the address does not resolve or the port is taken.
    """
    host = _host_for(address, port, is_alone=is_alone)
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    listener = socket.socket(family, socket.SOCK_STREAM)
    try:
        # As torch's own: otherwise a port whose last connection has just closed counts as taken.
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.bind((host, port))
        listener.listen(socket.SOMAXCONN)
    except OSError as error:
        listener.close()
        raise NetworkError(
            f"{address}:{port}: {own_name()} cannot listen there ({error.strerror}): another "
            "program may have the port; choose another"
        ) from error
    return listener


def _host_for(address: str, port: int, *, is_alone: bool) -> str:
    """The address to listen at: the one that `address` stands for, or all of them where that would not do."""
    try:
        host = str(socket.getaddrinfo(address, port, type=socket.SOCK_STREAM)[0][4][0])
    except OSError as error:
        raise NetworkError(f"{address}: does not resolve to an address ({error})") from error
    # Debian writes the host's name next to 127.0.1.1: other nodes, which know it by its real address, would
    # find nobody.
    if ipaddress.ip_address(host.partition("%")[0]).is_loopback and not is_alone:
        return _everywhere(f"{address} is loopback here")
    if not _is_ours(host):
        return _everywhere(f"{address} is no address of {own_name()}")
    return host


def _is_ours(host: str) -> bool:
    """Whether an interface of this host has the address."""
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    with socket.socket(family, socket.SOCK_STREAM) as probe:
        try:
            probe.bind((host, 0))
        except OSError:
            return False
    return True


def _everywhere(reason: str) -> str:
    """Every address, with a word why."""
    print(
        f"the store of the job listens on every address: {reason}. Give the address of the interface between "
        "the nodes (cluster.fabric.interface, --first-node), or close its port to others",
        file=sys.stderr,
        flush=True,
    )
    return "::" if socket.has_dualstack_ipv6() else "0.0.0.0"
