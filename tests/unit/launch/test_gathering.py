"""Nodes started by hand come together, or are told soon why not."""

import json
import re
import socket
import threading
import time
from collections.abc import Callable
from dataclasses import replace

import pytest

from k25_train.joining import network
from k25_train.joining.network import NetworkError, check_is_own
from launch import gathering
from launch.gathering import Gathering, GatheringError, Node, contradiction, report
from launch.torchrun import Place, listen_as_first

FIRST = Node(node=0, num_nodes=3, ranks=8, host="h0")
SECOND, THIRD = replace(FIRST, node=1, host="h1"), replace(FIRST, node=2, host="h2")


class Outcome:
    """What a thread returned or raised."""

    def __init__(self, function: Callable[[], None]) -> None:
        self.error: Exception | None = None

        def body() -> None:
            try:
                function()
            except GatheringError as error:
                self.error = error

        self.thread = threading.Thread(target=body)
        self.thread.start()

    def join(self) -> str:
        """The text of the error; empty if there was none."""
        self.thread.join(20)
        assert not self.thread.is_alive()
        return "" if self.error is None else str(self.error)


@pytest.fixture
def listener() -> socket.socket:
    """Where the first node listens."""
    return socket.create_server(("127.0.0.1", 0))


@pytest.fixture(autouse=True)
def fast(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whoever is silent is given up soon."""
    monkeypatch.setattr(gathering, "HELLO_S", 0.2)
    monkeypatch.setattr(gathering, "ANSWER_S", 0.5)
    monkeypatch.setattr(gathering.time, "sleep", lambda _seconds: None)


def reporting(listener: socket.socket, node: Node) -> Outcome:
    """A node that comes."""
    port = listener.getsockname()[1]
    return Outcome(lambda: report("127.0.0.1", port, node, 20.0))


def wait_until(happened: Callable[[], bool]) -> None:
    """Return as soon as it has."""
    deadline = time.monotonic() + 20
    while not happened():
        assert time.monotonic() < deadline
        threading.Event().wait(0.01)


def test_all_go_when_all_are_there(listener: socket.socket, capsys: pytest.CaptureFixture[str]) -> None:
    """Whatever else calls meanwhile."""
    address = listener.getsockname()
    strays = [socket.create_connection(address) for _ in range(3)]
    strays[0].sendall(b"GET / HTTP/1.1\r\n\r\n")
    strays[2].sendall(b"[" * 4000 + b"\n")
    strays[1].close()
    others = [reporting(listener, node) for node in (THIRD, SECOND)]
    Gathering(listener, FIRST, 20.0).run()
    assert [other.join() for other in others] == ["", ""]
    printed = capsys.readouterr().out
    assert "h0 waits for node 1, 2, 0 of at most 20 s" in printed
    assert "node 2 is there; 127.0.0.1 waits for the others" in printed
    # The port is free for the ranks.
    socket.create_server(address).close()
    for stray in strays:
        stray.close()


def test_who_does_not_come_is_named_everywhere(listener: socket.socket) -> None:
    other = reporting(listener, THIRD)
    with pytest.raises(GatheringError, match=r"node 1 of cluster\.nodes=3 did not come within 1 s"):
        Gathering(listener, FIRST, 1.0).run()
    assert "the first node, 127.0.0.1, ends: node 1 of cluster.nodes=3 did not come" in other.join()


@pytest.mark.parametrize(
    ("other", "expected"),
    [
        (replace(THIRD, node=1, host="h9"), "h9, --node 1: h1 is node 1 already"),
        (replace(THIRD, num_nodes=2), "h2, --node 2: cluster.nodes=2 .*=8 there, 3 and 8 on the first node"),
        (replace(THIRD, ranks=4), "h2, --node 2: cluster.nodes=3 cluster.gpus_per_node=4 there"),
    ],
)
def test_a_node_that_contradicts_ends_the_meeting(
    listener: socket.socket, other: Node, expected: str
) -> None:
    first = Gathering(listener, FIRST, 20.0)
    gathered = Outcome(first.run)
    second = reporting(listener, SECOND)
    wait_until(lambda: 1 in first._present)
    intruder = reporting(listener, other)
    for outcome in (gathered, second, intruder):
        text = outcome.join()
        assert re.search(expected, text), text


def test_a_second_first_node_is_told_who_is(listener: socket.socket) -> None:
    """And the first goes on; another program with the port is called that."""
    address = listener.getsockname()
    place = Place(node=0, address="127.0.0.1", port=address[1])
    gathered = Outcome(Gathering(listener, FIRST, 20.0).run)
    with pytest.raises(
        GatheringError, match=r"--node 0: h0 is the first node already, at 127\.0\.0\.1:\d+, of "
    ):
        listen_as_first(place, FIRST)
    others = [reporting(listener, node) for node in (SECOND, THIRD)]
    assert [gathered.join(), *(other.join() for other in others)] == ["", "", ""]
    with (
        socket.create_server(address),
        pytest.raises(NetworkError, match="another program may have the port"),
    ):
        listen_as_first(place, FIRST)


def test_nodes_are_numbered_once() -> None:
    assert contradiction(FIRST, {}, SECOND) is None
    for other in (replace(FIRST, host="h5"), replace(SECOND, node=3), replace(SECOND, node=-1)):
        assert "already: give every node another --node" in str(contradiction(FIRST, {}, other))


def test_a_node_that_leaves_may_come_again(
    listener: socket.socket, capsys: pytest.CaptureFixture[str]
) -> None:
    first = Gathering(listener, FIRST, 20.0)
    gathered = Outcome(first.run)
    with socket.create_connection(listener.getsockname()) as connection:
        hello = {"mark": gathering.MARK, "node": 1, "num_nodes": 3, "ranks": 8, "host": "h1"}
        connection.sendall(json.dumps(hello).encode() + b"\n")
        wait_until(lambda: 1 in first._present)
    wait_until(lambda: 1 not in first._present)
    others = [reporting(listener, node) for node in (SECOND, THIRD)]
    assert [gathered.join(), *(other.join() for other in others)] == ["", "", ""]
    assert "node 1 (h1) has left" in capsys.readouterr().out


@pytest.mark.parametrize("answer", [b"HTTP/1.1 400 Bad Request\r\n\r\n", b"[]\n", b"", None, b"x" * 9999])
def test_a_port_of_another_program_is_named(listener: socket.socket, answer: bytes | None) -> None:
    """Also of one that says nothing."""
    is_over = threading.Event()

    def serve() -> None:
        listener.settimeout(0.1)
        while not is_over.is_set():
            try:
                connection, _ = listener.accept()
            except TimeoutError:
                continue
            if answer is not None:
                with connection:
                    connection.recv(100)
                    connection.sendall(answer)

    thread = threading.Thread(target=serve)
    thread.start()
    try:
        with pytest.raises(
            GatheringError, match=r"is not `launch\.torchrun` of the first node: start that first"
        ):
            report("127.0.0.1", listener.getsockname()[1], SECOND, 20.0)
    finally:
        is_over.set()
        thread.join()
        listener.close()


def test_a_host_is_this_machine_if_it_leads_here(
    listener: socket.socket, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(network, "CONNECT_S", 0.5)
    with listener:
        stray = socket.create_connection(listener.getsockname())
        check_is_own("127.0.0.1", listener)
        check_is_own("localhost", listener)
        stray.close()
        with pytest.raises(NetworkError, match=r"192\.0\.2\.1 \(192\.0\.2\.1\) is not this machine"):
            check_is_own("192.0.2.1", listener)
        with pytest.raises(NetworkError, match="does not resolve"):
            check_is_own("no-such-host.invalid", listener)


def test_a_resolver_that_hangs_is_given_up(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(network, "RESOLVE_S", 0.1)
    is_over = threading.Event()
    monkeypatch.setattr(socket, "getaddrinfo", lambda *_args, **_options: [is_over.wait(20)][1:])
    with pytest.raises(NetworkError, match=r"the name 'n7' does not resolve on .* within 0\.1 s"):
        network.resolve("n7")
    is_over.set()


@pytest.mark.parametrize("host", ["a" * 64, "..", "\udcff"])
def test_what_is_no_name_does_not_resolve(host: str) -> None:
    with pytest.raises(NetworkError, match="does not resolve"):
        network.resolve(host)
