"""Ranks that find each other, or are told who is missing, there twice, or of another job."""

import socket
import threading
from collections.abc import Iterator
from dataclasses import replace

import pytest
import torch.distributed as dist

from k25_train.joining import join as joining
from k25_train.joining.environment import RankEnvironment
from k25_train.joining.join import connect, join, wait_for_all
from k25_train.joining.network import NetworkError
from k25_train.joining.place import JoinError, reachable_name
from tests.helpers.ranks import free_port

FIRST = RankEnvironment(
    rank=0, world_size=2, local_rank=0, local_world_size=1, node=0, address="127.0.0.1", port=29500,
    by_torchrun=False, agent_has_store=False,
)  # fmt: skip
SECOND = replace(FIRST, rank=1, node=1)


@pytest.fixture(autouse=True)
def fast(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Whoever is not there soon does not come."""
    monkeypatch.setattr(joining, "JOIN_S", 0.6)
    monkeypatch.setattr(joining, "FIRST_PROGRESS_S", 0.1)
    yield


def test_ranks_find_each_other_whichever_is_first(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(joining, "JOIN_S", 20.0)
    port = free_port()
    found: list[bytes] = []

    def second() -> None:
        store = join(replace(SECOND, port=port), 20.0)
        found.append(store.get("key"))

    thread = threading.Thread(target=second)
    thread.start()
    store = join(replace(FIRST, port=port), 20.0)
    store.set("key", "value")
    thread.join(20)
    assert found == [b"value"]


def test_ranks_that_torchrun_starts_again_meet_in_the_same_store(monkeypatch: pytest.MonkeyPatch) -> None:
    """What the first ones have said is still there, by other processes."""
    monkeypatch.setattr(joining, "JOIN_S", 20.0)
    stores: list[dist.HashStore] = [dist.HashStore()]
    monkeypatch.setattr(joining, "connect", lambda _where: stores[0])
    for restart in range(2):
        monkeypatch.setattr(joining, "own_name", lambda restart=restart: f"host of start {restart}")
        ranks = [replace(each, agent_has_store=True, restart=restart) for each in (FIRST, SECOND)]
        threads = [threading.Thread(target=join, args=(rank, 20.0)) for rank in ranks]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(20)
        assert stores[0].get(f"start_{restart}/join/num_here") == b"2"


def test_alone_there_is_nobody_to_find() -> None:
    assert isinstance(join(replace(FIRST, world_size=1, address="nowhere"), 1.0), dist.HashStore)


def test_who_is_missing_is_told_while_others_wait(capsys: pytest.CaptureFixture[str]) -> None:
    many = replace(FIRST, world_size=64, local_world_size=8)
    with pytest.raises(
        JoinError, match=r"63 of 64 ranks: 1, 2, .* and 55 more \(of node 0, 1, .*\) after 0\.6 s"
    ):
        wait_for_all(dist.HashStore(), many)
    printed = capsys.readouterr().out
    assert "waiting for 63 of 64 ranks: 1, 2, 3, 4, 5, 6, 7, 8 and 55 more (of node 0, 1" in printed
    assert "of at most 0.6 s" in printed


def test_a_rank_that_is_there_twice_is_told() -> None:
    store = dist.HashStore()
    store.set("rank/1", "h9, process 7")
    with pytest.raises(
        JoinError, match=r"RANK=1 is there twice, on h9, process 7 and on .*: two nodes have the same"
    ):
        wait_for_all(store, SECOND)


def test_ranks_of_another_number_are_told() -> None:
    store = dist.HashStore()
    store.set("world_size", "4")
    with pytest.raises(JoinError, match=r"WORLD_SIZE=2 of rank 1 on .*, but 4 of another: start every node"):
        wait_for_all(store, SECOND)


@pytest.mark.parametrize(
    "wrong",
    [replace(SECOND, rank=2, world_size=4), replace(SECOND, rank=0, node=0)],
    ids=["another number", "the same rank"],
)
def test_who_waits_is_told_what_is_wrong_with_another(
    monkeypatch: pytest.MonkeyPatch, wrong: RankEnvironment
) -> None:
    """At once: it would wait for ten minutes, and then say that ranks are missing."""
    monkeypatch.setattr(joining, "JOIN_S", 60.0)
    monkeypatch.setattr(joining.os, "getpid", lambda: threading.get_ident())
    store = dist.HashStore()
    errors: dict[str, str] = {}

    def wait(name: str, where: RankEnvironment) -> None:
        try:
            wait_for_all(store, where)
        except JoinError as error:
            errors[name] = str(error)

    first = threading.Thread(target=wait, args=("first", replace(FIRST, world_size=3)))
    first.start()
    while not store.check(["rank/0"]):
        pass
    wait("wrong", replace(wrong, world_size=wrong.world_size if wrong.world_size == 4 else 3))
    first.join(30)
    assert not first.is_alive() and errors["first"] == errors["wrong"]


def test_a_store_that_ends_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    """As it does when the first node is stopped."""
    monkeypatch.setattr(joining, "connect", lambda _where: dist.HashStore())

    def ended(_store: dist.Store, _where: RankEnvironment) -> None:
        raise dist.DistNetworkError("Connection reset by peer")

    monkeypatch.setattr(joining, "wait_for_all", ended)
    with pytest.raises(
        JoinError, match=r"127\.0\.0\.1:29500 has ended while rank 1 waited .*see what the first"
    ):
        join(SECOND, 1.0)


def test_a_store_that_does_not_come_is_named_with_progress(capsys: pytest.CaptureFixture[str]) -> None:
    port = free_port()
    with pytest.raises(
        JoinError, match=rf"MASTER_PORT={port} in the environment of rank 1: .*refused.* after 0\.6 s"
    ):
        join(replace(SECOND, port=port), 1.0)
    assert f"rank 1 on {socket.gethostname()} waits for the job's store at" in capsys.readouterr().out


def test_what_is_no_store_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(joining, "ANSWER_S", 1.0)
    with socket.create_server(("127.0.0.1", 0)) as listener:
        port = listener.getsockname()[1]
        with pytest.raises(
            NetworkError, match=r"does not answer as a store of torch within .* another program"
        ):
            connect(replace(SECOND, port=port))


def test_on_one_machine_its_own_name_need_not_resolve(monkeypatch: pytest.MonkeyPatch) -> None:
    """As `torchrun --standalone` gives it."""
    here = replace(FIRST, address="no-such-host.invalid", local_world_size=2)
    assert reachable_name(here) == "127.0.0.1"
    with pytest.raises(NetworkError, match="does not resolve"):
        reachable_name(replace(here, local_world_size=1))
