"""Where ranks meet: addresses and ports that are there, and errors that name those that are not."""

import json
import os
import socket
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from k25_train.compose.resolve import compose
from k25_train.errors import ConfigError
from k25_train.joining.network import endpoint
from launch import rendezvous
from launch.rendezvous import RendezvousError, address_of, free_port, is_free, wait_for
from launch.torchrun import Place, find_place, start_command
from tests.helpers.project_sources import REPO
from tests.helpers.ranks import free_port as any_port

SMOKE = ["experiment=smoke", "cluster.nodes=2", "cluster.gpus_per_node=2"]


@pytest.fixture
def taken() -> "socket.socket":
    """A socket that listens."""
    with socket.create_server(("127.0.0.1", 0)) as listener:
        yield listener


def port_of(listener: socket.socket) -> int:
    """The port it listens on."""
    return int(listener.getsockname()[1])


def test_a_port_that_something_listens_on_is_passed_over(taken: socket.socket) -> None:
    port = port_of(taken)
    assert not is_free(port)
    other = any_port()
    assert free_port([port, other]) == other


def test_a_port_whose_connection_has_just_closed_is_free() -> None:
    """What torch's store takes must not be refused: attempts follow each other on the same node."""
    with socket.create_server(("127.0.0.1", 0)) as listener:
        port = port_of(listener)
        client = socket.create_connection(("127.0.0.1", port))
        server, _ = listener.accept()
        server.close()
        client.close()
    assert is_free(port)


def test_where_every_port_is_taken_they_are_named(taken: socket.socket) -> None:
    port = port_of(taken)
    with pytest.raises(
        RendezvousError, match=f"every port from {port} to {port} of .* is taken: set cluster"
    ):
        free_port([port])


def test_the_address_is_that_of_the_interface() -> None:
    assert address_of("lo") == "127.0.0.1"
    assert address_of(None) == socket.gethostname()


def test_an_address_of_ipv6_is_one_that_other_nodes_can_use(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Neither a link-local one, which needs a zone, nor one that is deprecated or not yet checked."""
    kernel = tmp_path / "if_inet6"
    rows = [
        f"{digits:0<28}{number:04x} 02 40 {scope} {flags} {name}"
        for number, (digits, scope, flags, name) in enumerate(
            [
                ("fe80", "20", "80", "bond0"), ("fd", "00", "20", "bond0"), ("fd", "00", "40", "bond0"),
                ("fd", "00", "80", "eth1"), ("fd", "00", "80", "bond0"), ("fd", "00", "80", "bond0"),
            ]
        )
    ]  # fmt: skip
    kernel.write_text("\n".join(rows) + "\n")
    monkeypatch.setattr(rendezvous, "_ADDRESSES", kernel)
    assert address_of("bond0", "ipv6") == "fd00::4"
    kernel.write_text(rows[0] + "\n")
    with pytest.raises(
        RendezvousError, match=r"interface=bond0: .* no .*IPv6 address beyond the link \(IPv6"
    ):
        address_of("bond0", "ipv6")
    monkeypatch.setattr(rendezvous, "_ADDRESSES", tmp_path / "none")
    with pytest.raises(RendezvousError, match=r"beyond the link \(IPv6 is off\)"):
        address_of("bond0", "ipv6")
    assert address_of(None, "ipv6") == socket.gethostname()


def test_an_endpoint_of_ipv6_has_brackets() -> None:
    assert endpoint("fd00::4", 29500) == "[fd00::4]:29500"
    assert endpoint("n1", 29500) == "n1:29500" and endpoint("10.0.0.1", 1) == "10.0.0.1:1"


@pytest.mark.skipif(not socket.has_dualstack_ipv6(), reason="this machine has no IPv6")
def test_ranks_meet_over_ipv6() -> None:
    port = any_port()
    command = [sys.executable, "-m", "launch.rendezvous", str(port), "lo", "ipv6"]
    done = subprocess.run(command, cwd=REPO, capture_output=True, text=True, check=True)
    assert json.loads(done.stdout)["address"] == "::1"
    with socket.create_server(("::1", 0), family=socket.AF_INET6) as listener:
        wait_for("::1", port_of(listener), timeout_s=10.0)
    with pytest.raises(RendezvousError, match=r"cannot reach \[::1\]:\d+"):
        wait_for("::1", any_port(), timeout_s=0.3)
    command = start_command(compose(SMOKE), place(0, f"[::1]:{port}"), "k25_train.train", SMOKE)
    assert {"--master-addr=::1", f"--master-port={port}"} <= set(command)


def test_an_interface_that_is_not_there_is_named_with_those_that_are() -> None:
    with pytest.raises(RendezvousError, match=r"cluster\.fabric\.interface=ib7: .* it has .*lo"):
        address_of("ib7")


def test_the_first_node_reports_where_ranks_meet(taken: socket.socket) -> None:
    port = port_of(taken)
    command = [sys.executable, "-m", "launch.rendezvous", str(port), "lo"]
    done = subprocess.run(command, cwd=REPO, capture_output=True, text=True, check=True)
    found = json.loads(done.stdout)
    assert found["address"] == "127.0.0.1"
    assert port < int(found["port"]) < port + 100


def test_a_node_waits_for_the_first_one() -> None:
    port = any_port()

    def listen_later() -> None:
        time.sleep(0.5)
        with socket.create_server(("127.0.0.1", port)) as listener:
            listener.accept()

    thread = threading.Thread(target=listen_later)
    thread.start()
    wait_for("127.0.0.1", port, timeout_s=30.0)
    thread.join()


def test_a_rendezvous_that_is_out_of_reach_is_named(capsys: pytest.CaptureFixture[str]) -> None:
    port = any_port()
    with pytest.raises(RendezvousError) as caught:
        wait_for("127.0.0.1", port, timeout_s=0.3)
    assert f"cannot reach 127.0.0.1:{port} ([Errno 111] Connection refused) after 0.3 s" in str(caught.value)
    assert "a firewall closes the port" in str(caught.value)
    printed = capsys.readouterr().out
    assert f"waits for the first node's ranks at 127.0.0.1:{port}" in printed
    assert "0 of at most 0.3 s" in printed


def test_a_first_node_whose_name_does_not_resolve_is_not_waited_for() -> None:
    with pytest.raises(RendezvousError, match=r"the name 'no-such-host\.invalid' does not resolve on"):
        wait_for("no-such-host.invalid", 29500)


def test_a_host_that_does_not_know_its_own_name_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    """Other nodes would look for it by that name."""
    monkeypatch.setattr(socket, "gethostname", lambda: "no-such-host.invalid")
    with pytest.raises(RendezvousError, match="add it to DNS or /etc/hosts, or name the network interface"):
        address_of(None)


def place(node: int | None, first_node: str | None) -> Place:
    """The place of one of two nodes."""
    return find_place(compose(SMOKE), node, first_node)


def test_by_hand_the_first_node_runs_torchrun() -> None:
    port = any_port()
    config = compose(SMOKE)
    first = find_place(config, 0, f"127.0.0.1:{port}")
    command = start_command(config, first, "k25_train.train", [*SMOKE, "train.seed=7"])
    assert command[1:] == [
        "-m", "launch.agent", "--nnodes=2", "--node-rank=0", "--nproc-per-node=2",
        "--master-addr=127.0.0.1", f"--master-port={port}", "--rdzv-conf=timeout=300", "--max-restarts=0",
        "-m", "k25_train.train", *SMOKE, "train.seed=7",
    ]  # fmt: skip


def test_one_node_by_hand_needs_no_address() -> None:
    alone = find_place(compose(["experiment=smoke"]), None, None)
    assert (alone.node, alone.address) == (0, "127.0.0.1") and is_free(alone.port)
    command = start_command(compose(["experiment=smoke"]), alone, "k25_train.train", [])
    assert "--master-addr=127.0.0.1" in command and "--nnodes=1" in command


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (
            ["--node", "2", "--first-node", "h1", *SMOKE],
            "--node 2: must be within 0 to cluster.nodes - 1 (1)",
        ),
        (["--node", "0", "--first-node", "h1", *SMOKE, "train.steps=0"], "train.steps=0"),
    ],
)
def test_by_hand_errors_are_shown_without_a_traceback(arguments: list[str], expected: str) -> None:
    command = [sys.executable, "-m", "launch.torchrun", *arguments]
    done = subprocess.run(
        command, cwd=REPO, capture_output=True, text=True, check=False, env={**os.environ, "LC_ALL": "C"}
    )
    assert done.returncode == 2
    assert expected in done.stderr and "Traceback" not in done.stderr


@pytest.mark.parametrize(
    "given", ["n1:abc", "n1:0", "n1:65536", "n1:", ":29500", "[::1", "::1:29500", "[n1]:29500"]
)
def test_by_hand_an_address_that_is_none_is_refused(given: str) -> None:
    with pytest.raises(ConfigError, match=r"^--first-node .*: must be HOST or HOST:PORT"):
        place(0, given)


@pytest.mark.parametrize(("node", "first_node"), [(None, "h1"), (1, None), (None, None)])
def test_several_nodes_by_hand_need_both_arguments(node: int | None, first_node: str | None) -> None:
    with pytest.raises(ConfigError, match="--node and --first-node must be given"):
        place(node, first_node)


@pytest.mark.parametrize(
    ("port", "told"),
    [("abc", "FIRST_PORT='abc': must be a whole number"), ("65536", "every port from 65536")],
)
def test_a_port_that_is_none_is_named(port: str, told: str, capsys: pytest.CaptureFixture[str]) -> None:
    """As does a range that goes beyond the last port."""
    with pytest.MonkeyPatch.context() as patch, pytest.raises(SystemExit) as ended:
        patch.setattr(sys, "argv", ["rendezvous", port])
        rendezvous.main()
    assert ended.value.code == 2
    assert told in capsys.readouterr().err
