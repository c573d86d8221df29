"""MTU between nodes: packets as large as the cards allow, which nothing may split, over every rail.

A switch port with a smaller MTU drops large packets silently, and small ones arrive: connections are set up,
and then hang. Packets are UDP between the addresses of the cards' network interfaces, so neither ping nor its
privileges are needed; each node answers with the size of what arrived.
"""

import contextlib
import errno
import ipaddress
import selectors
import socket
import threading
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace

from k25_train.config.fabric import AddressFamily, FabricConfig
from launch.preflight.hcas import Hca

HEADER_BYTES = {socket.AF_INET: 28, socket.AF_INET6: 48}
"""IP and UDP headers, which the MTU includes."""
LARGEST_BYTES = 65_535
"""Largest IP packet; loopback allows more."""
SMALLER_BYTES = (4200, 1500)
"""Sizes that are tried if the full one does not arrive."""
NUM_TRIES = 3
"""Packets per size: single ones may be lost."""
ANSWER_S = 0.3
"""Time for an answer, far above any round trip within a cluster."""
IP_MTU_DISCOVER, IPV6_MTU_DISCOVER, IPV6_DONTFRAG, PROBE = 10, 23, 62, 3
"""Linux's options (in.h, in6.h): a packet is neither split nor limited by what is known of its path."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Rail:
    """A card's place in the network."""

    card: str
    interface: str
    address: str
    mtu_bytes: int
    port: int = 0
    """UDP port of the node's answers; 0 before it listens."""


@dataclass(frozen=True, slots=True, kw_only=True)
class PathTry:
    """A packet to the same card of another node."""

    card: str
    target: int
    """Leader of the other node."""
    wanted_bytes: int
    """The smaller of both cards' MTUs."""
    arrived_bytes: int
    """The largest size that arrived; 0 if none did."""
    reason: str = ""
    """Why nothing could be sent; empty if it could."""


def rails_of(hcas: Sequence[Hca], fabric: FabricConfig | None) -> list[Rail]:
    """The cards' places, of those with an MTU and a routable address of the fabric's family."""
    if fabric is None:
        return []
    wants_ipv4 = fabric.address_family is AddressFamily.ipv4
    rails = []
    for hca in hcas:
        gids = [gid for gid in hca.routable_gids if bool(gid.ipv4) == wants_ipv4]
        if gids and gids[0].interface and hca.mtu_bytes:
            address = gids[0].ipv4 or str(ipaddress.ip_address(gids[0].address))
            rails.append(
                Rail(card=hca.name, interface=gids[0].interface, address=address, mtu_bytes=hca.mtu_bytes)
            )
    return rails


@contextlib.contextmanager
def answering(rails: Sequence[Rail]) -> Iterator[dict[str, Rail]]:
    """Answer packets on all rails, and give others what they need for it: card -> rail with its port.

    A rail on which this node cannot listen is left out.
    """
    with contextlib.ExitStack() as stack:
        selector = stack.enter_context(selectors.DefaultSelector())
        open_rails = {}
        for rail in rails:
            with contextlib.suppress(OSError):
                listener = stack.enter_context(_socket_on(rail))
                selector.register(listener, selectors.EVENT_READ)
                open_rails[rail.card] = replace(rail, port=listener.getsockname()[1])
        ended = threading.Event()
        thread = threading.Thread(target=_answer, args=(selector, ended), daemon=True)
        thread.start()
        try:
            yield open_rails
        finally:
            ended.set()
            thread.join()


def try_paths(rails: Sequence[Rail], targets: Mapping[int, Mapping[str, Rail]]) -> list[PathTry]:
    """Try each rail to the same card of each node (leader -> its rails), all rails at the same time."""
    tries: list[PathTry] = []
    with ThreadPoolExecutor(max_workers=max(1, len(rails))) as pool:
        for leader, others in targets.items():
            here = [rail for rail in rails if rail.card in others]
            there = [others[rail.card] for rail in here]
            tries += pool.map(try_path, here, there, [leader] * len(here))
    return tries


def try_path(rail: Rail, other: Rail, leader: int) -> PathTry:
    """The largest packet that arrives, of both cards' full size or some smaller ones."""
    wanted = min(rail.mtu_bytes, other.mtu_bytes, LARGEST_BYTES)
    sizes = [wanted, *(size for size in SMALLER_BYTES if size < wanted)]
    arrived, reason = 0, ""
    try:
        with _socket_on(rail) as sender:
            header = HEADER_BYTES[sender.family]
            sender.settimeout(ANSWER_S)
            sender.connect((other.address, other.port))
            arrived = next((size for size in sizes if _arrives(sender, size - header)), 0)
            # Without any answer, not even to the smallest packet, the size is not what is wrong.
            if not arrived and _arrives(sender, 1):
                arrived = header + 1
    except OSError as error:
        reason = str(error)
    return PathTry(card=rail.card, target=leader, wanted_bytes=wanted, arrived_bytes=arrived, reason=reason)


def _arrives(sender: socket.socket, num_bytes: int) -> bool:
    for number in range(NUM_TRIES):
        # Late answers to earlier packets are told from this one's by the first byte.
        packet = bytes([number]) * num_bytes
        try:
            sender.send(packet)
            answer = sender.recv(64)
            while answer != _answer_to(packet):
                answer = sender.recv(64)
        except TimeoutError:
            continue
        except OSError as error:
            if error.errno == errno.EMSGSIZE:
                return False
            raise
        return True
    return False


def _answer_to(packet: bytes) -> bytes:
    return f"{packet[0]} {len(packet)}".encode()


def _answer(selector: selectors.BaseSelector, ended: threading.Event) -> None:
    while not ended.is_set():
        for key, _ in selector.select(timeout=0.1):
            listener = key.fileobj
            assert isinstance(listener, socket.socket)
            with contextlib.suppress(OSError):
                packet, sender = listener.recvfrom(LARGEST_BYTES)
                if packet:
                    listener.sendto(_answer_to(packet), sender)


def _socket_on(rail: Rail) -> socket.socket:
    """A UDP socket of the rail's address and interface, whose packets are not split. Raises `OSError`."""
    family = socket.AF_INET6 if ":" in rail.address else socket.AF_INET
    opened = socket.socket(family, socket.SOCK_DGRAM)
    try:
        # Otherwise the routing table may choose another rail of the same network.
        opened.setsockopt(socket.SOL_SOCKET, socket.SO_BINDTODEVICE, rail.interface.encode())
        if family == socket.AF_INET6:
            opened.setsockopt(socket.IPPROTO_IPV6, IPV6_MTU_DISCOVER, PROBE)
            opened.setsockopt(socket.IPPROTO_IPV6, IPV6_DONTFRAG, 1)
        else:
            opened.setsockopt(socket.IPPROTO_IP, IP_MTU_DISCOVER, PROBE)
        opened.bind((rail.address, 0))
    except BaseException:
        opened.close()
        raise
    return opened
