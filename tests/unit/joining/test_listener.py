"""The store of a job listens where its ranks look for it, and nowhere else."""

import datetime
import socket

import pytest

from k25_train.joining.listener import listen_at
from k25_train.joining.network import NetworkError
from tests.helpers.ranks import free_port
from tests.helpers.sockets import is_loopback, listening_addresses

SMOKE = ["experiment=smoke", "cluster.nodes=2", "cluster.gpus_per_node=2"]


@pytest.mark.parametrize("name", ["127.0.0.1", "localhost"])
def test_a_job_of_one_host_listens_on_loopback(name: str) -> None:
    port = free_port()
    with listen_at(name, port, is_alone=True):
        assert [is_loopback(address) for address, at in listening_addresses() if at == port] == [True]


@pytest.mark.parametrize(
    ("name", "reason"), [("localhost", "is loopback here"), ("192.0.2.7", "is no address of")]
)
def test_where_others_would_find_nobody_it_listens_everywhere_and_says_so(
    name: str, reason: str, capsys: pytest.CaptureFixture[str]
) -> None:
    port = free_port()
    with listen_at(name, port, is_alone=False), socket.create_connection(("127.0.0.1", port), timeout=5):
        assert f"listens on every address: {name} {reason}" in capsys.readouterr().err


def test_a_port_that_is_taken_and_a_name_that_is_none_are_named() -> None:
    port = free_port()
    with (
        listen_at("127.0.0.1", port, is_alone=True),
        pytest.raises(NetworkError, match=f"127.0.0.1:{port}: .* cannot listen there .*in use"),
    ):
        listen_at("127.0.0.1", port, is_alone=True)
    with pytest.raises(NetworkError, match=r"no-such-host.invalid: does not resolve"):
        listen_at("no-such-host.invalid", port, is_alone=True)


def test_torchruns_store_listens_at_the_address_alone() -> None:
    """As torch's static rendezvous opens it; clients reach it as ever."""
    from torch.distributed import TCPStore
    from torch.distributed.elastic.rendezvous import RendezvousParameters, static_tcp_rendezvous

    from launch.agent import open_store

    port = free_port()
    parameters = RendezvousParameters(
        backend="static", endpoint=f"127.0.0.1:{port}", run_id="1", min_nodes=1, max_nodes=1, rank=0
    )
    with pytest.MonkeyPatch.context() as patch:
        # The name that the rendezvous looks up: it fails here if torch renames it.
        patch.setattr(static_tcp_rendezvous, "TCPStore", open_store)
        handler = static_tcp_rendezvous.create_rdzv_handler(parameters)
        found = handler.next_rendezvous()
    assert {address for address, at in listening_addresses() if at == port} == {"127.0.0.1"}
    client = TCPStore("127.0.0.1", port, timeout=datetime.timedelta(seconds=10))
    found.store.set("key", "value")
    assert client.get("1/key") == b"value"


def test_preflights_store_listens_at_the_address_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    from launch.preflight.coordination import join

    port = free_port()
    sizes = {"RANK": 0, "LOCAL_RANK": 0, "WORLD_SIZE": 2, "LOCAL_WORLD_SIZE": 2, "MASTER_PORT": port}
    for name, value in sizes.items():
        monkeypatch.setenv(name, str(value))
    monkeypatch.setenv("MASTER_ADDR", "127.0.0.1")
    coordinator = join(10.0)
    assert coordinator.world_size == 2
    assert {address for address, at in listening_addresses() if at == port} == {"127.0.0.1"}
