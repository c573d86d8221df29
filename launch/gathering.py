"""Nodes that are started by hand meet before their ranks start: each waits for all, and says for whom.

torchrun would wait in silence. The first node listens at the port at which its ranks will; the others
connect, say who they are, and are told to go once all are there. Messages are single lines of JSON.
"""

import contextlib
import json
import selectors
import socket
import time
from dataclasses import asdict, dataclass
from typing import Any

from k25_train.errors import K25Error
from k25_train.joining.network import CONNECT_S, PROGRESS_S, say

MAX_BYTES = 4096
"""Longest message; whoever sends more is not one of us."""
MARK = "k25-train"
WHO: dict[str, object] = {"asks": "who"}
"""What another first node sends that finds the port taken."""
ANSWER_S = 4.0
"""Longest time that the first node takes to answer a newcomer."""
HELLO_S = 2.0
"""Longest time that a newcomer takes to say who it is; nobody else is taken in meanwhile."""
NUM_TRIES = 3
"""Times that a node introduces itself."""
MAX_NAMED = 8
"""Nodes that a line names."""


class GatheringError(K25Error):
    """The nodes of a job do not come together."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Node:
    """What a node says of itself."""

    node: int
    """Its index, --node."""
    num_nodes: int
    """`cluster.nodes`, as it is configured there."""
    ranks: int
    """`cluster.gpus_per_node`, as it is configured there."""
    host: str


class Gathering:
    """The first node, waiting for the others."""

    def __init__(self, listener: socket.socket, own: Node, limit_s: float) -> None:
        self.listener = listener
        self.own = own
        self.limit_s = limit_s
        self._present: dict[int, tuple[Node, socket.socket]] = {}

    def run(self) -> None:
        """Wait for all, then let them go; closes the listener.

        Raises `GatheringError`, here and on those that are there, if a node contradicts another; and after
        `limit_s`, naming the missing ones.
        """
        with contextlib.ExitStack() as stack, selectors.DefaultSelector() as selector:
            stack.enter_context(self.listener)
            selector.register(self.listener, selectors.EVENT_READ)
            start_s, told_s = time.monotonic(), -PROGRESS_S
            try:
                while missing := self._missing():
                    waited_s = time.monotonic() - start_s
                    if waited_s >= self.limit_s:
                        raise self._too_late(missing)
                    if waited_s - told_s >= PROGRESS_S:
                        told_s = waited_s
                        of_limit = f"{waited_s:.0f} of at most {self.limit_s:g} s"
                        say(f"{self.own.host} waits for node {missing}, {of_limit}")
                    self._attend(stack, selector)
            except GatheringError as error:
                self._tell({"error": str(error)})
                raise
            # The port is free again before anyone looks for the ranks there.
            selector.unregister(self.listener)
            self.listener.close()
            self._tell({"go": True})

    def _attend(self, stack: contextlib.ExitStack, selector: selectors.BaseSelector) -> None:
        """Take newcomers in and notice who has left, for at most a second."""
        for key, _ in selector.select(timeout=min(1.0, self.limit_s)):
            if key.fileobj is self.listener:
                self._welcome(stack, selector)
            else:
                # Whoever waits sends nothing, so it has ended.
                selector.unregister(key.fileobj)
                self._drop(key.fileobj)

    def _missing(self) -> str:
        """The nodes that are not there, in words; empty if all are."""
        missing = [node for node in range(1, self.own.num_nodes) if node not in self._present]
        more = f" and {len(missing) - MAX_NAMED} more" if missing[MAX_NAMED:] else ""
        return ", ".join(map(str, missing[:MAX_NAMED])) + more

    def _too_late(self, missing: str) -> GatheringError:
        return GatheringError(
            f"node {missing} of cluster.nodes={self.own.num_nodes} did not come within {self.limit_s:g} s: "
            "start `python -m launch.torchrun --node N` there, and see what it prints"
        )

    def _welcome(self, stack: contextlib.ExitStack, selector: selectors.BaseSelector) -> None:
        """Take a newcomer in, unless it is not of this job."""
        connection, _ = self.listener.accept()
        stack.enter_context(connection)
        connection.settimeout(HELLO_S)
        said = _receive(connection)
        if said is None or said.pop("mark", None) != MARK:
            # A port scanner, a health check.
            connection.close()
            return
        if said == WHO:
            with connection:
                _send(connection, {"mark": MARK, **asdict(self.own)})
            return
        try:
            other = Node(**said)
            known = {number: node for number, (node, _) in self._present.items()}
            trouble = contradiction(self.own, known, other)
        except TypeError:
            trouble = "speaks another version: use the same code on every node"
        if trouble is not None:
            error = GatheringError(f"{said.get('host')}, --node {said.get('node')}: {trouble}")
            _send(connection, {"error": str(error)})
            raise error
        _send(connection, {"here": True})
        self._present[other.node] = (other, connection)
        selector.register(connection, selectors.EVENT_READ)

    def _drop(self, connection: object) -> None:
        (number,) = [number for number, (_, known) in self._present.items() if known is connection]
        node, _ = self._present.pop(number)
        say(f"node {number} ({node.host}) has left")

    def _tell(self, message: dict[str, object]) -> None:
        for _, connection in self._present.values():
            _send(connection, message)


def contradiction(own: Node, present: dict[int, Node], other: Node) -> str | None:
    """Why a newcomer cannot be of this job, or None."""
    if (other.num_nodes, other.ranks) != (own.num_nodes, own.ranks):
        return (
            f"cluster.nodes={other.num_nodes} cluster.gpus_per_node={other.ranks} there, {own.num_nodes} and "
            f"{own.ranks} on the first node: give all nodes the same"
        )
    if not 1 <= other.node < own.num_nodes or other.node in present:
        taken = present[other.node].host if other.node in present else own.host
        return f"{taken} is node {other.node} already: give every node another --node"
    return None


def report(address: str, port: int, own: Node, limit_s: float) -> None:
    """Tell the first node, which listens, that this one is there, and wait for all.

    Raises `GatheringError` if it is not the first node that answers, it refuses this one, or not all nodes
    come within `limit_s`.
    """
    for _ in range(NUM_TRIES):
        with contextlib.suppress(OSError), socket.create_connection((address, port), CONNECT_S) as connection:
            connection.settimeout(ANSWER_S)
            _send(connection, {"mark": MARK, **asdict(own)})
            answer = _receive(connection)
            if answer is not None:
                _wait_to_go(connection, answer, address, own, limit_s)
                return
        # The first node may be checking its own address, and take nobody in.
        time.sleep(1.0)
    raise GatheringError(
        f"what listens at {address}:{port} is not `launch.torchrun` of the first node: start that first, or "
        "use another port on all nodes (--first-node HOST:PORT)"
    )


def first_node_at(address: str, port: int) -> Node | None:
    """The first node that waits there for others; None if it is another program that has the port."""
    with contextlib.suppress(OSError), socket.create_connection((address, port), CONNECT_S) as connection:
        connection.settimeout(ANSWER_S)
        _send(connection, {"mark": MARK, **WHO})
        said = _receive(connection) or {}
        with contextlib.suppress(TypeError):
            return Node(**said) if said.pop("mark", None) == MARK else None
    return None


def _wait_to_go(
    connection: socket.socket, answer: dict[str, Any], address: str, own: Node, limit_s: float
) -> None:
    """Wait, taken in by the first node, until it lets all go."""
    start_s = time.monotonic()
    connection.settimeout(PROGRESS_S)
    while "go" not in answer:
        if "error" in answer:
            raise GatheringError(f"the first node, {address}, ends: {answer['error']}")
        waited_s = time.monotonic() - start_s
        # The first node has its own limit, and says who is missing.
        if waited_s > limit_s + ANSWER_S:
            raise GatheringError(f"the first node, {address}, is silent after {waited_s:.0f} s")
        say(f"node {own.node} is there; {address} waits for the others, {waited_s:.0f} of {limit_s:g} s")
        with contextlib.suppress(TimeoutError):
            answer = _receive(connection, waits=True) or {"error": "it has closed the connection"}


def _send(connection: socket.socket, message: dict[str, object]) -> None:
    """Send a line; a peer that is gone is noticed elsewhere."""
    with contextlib.suppress(OSError):
        connection.sendall(json.dumps(message).encode() + b"\n")


def _receive(connection: socket.socket, *, waits: bool = False) -> dict[str, Any] | None:
    """The next line; None if there is none within the connection's time limit, or it is not a message. With
    `waits`, raises TimeoutError instead if nothing has come yet."""
    text = b""
    try:
        while not text.endswith(b"\n"):
            part = connection.recv(1)
            if not part or len(text) > MAX_BYTES:
                return None
            text += part
        message = json.loads(text)
    except TimeoutError:
        if text or not waits:
            return None
        raise
    # A thousand brackets are no ValueError.
    except (OSError, ValueError, RecursionError):
        return None
    return message if isinstance(message, dict) else None
