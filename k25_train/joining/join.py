"""A rank joins its job: connects to the store at which ranks meet, and waits until all are there.

torch would do so silently, for as long as its collectives may take. Here a name that does not resolve, a port
that is taken and a rank that is there twice are named in seconds, and who is missing while others wait.
"""

import datetime
import os
import threading
import time

import torch.distributed as dist

from k25_train.joining.environment import RankEnvironment
from k25_train.joining.listener import listen_at
from k25_train.joining.network import PROGRESS_S, NetworkError, is_listening, own_name, say, wait_for
from k25_train.joining.place import JoinError, naming_variables, reachable_name

JOIN_S = 600.0
"""Longest time to wait for the other ranks: imports take minutes on a cold file system."""
ANSWER_S = 15.0
"""Longest time that a store takes to answer the first request, and `PER_RANK_S` for each rank of the job: all
ask at once."""
PER_RANK_S = 0.01
FIRST_PROGRESS_S = 2.0
"""Seconds after which the first line tells who is missing."""
POLL_S = 0.05
ENOUGH = 2**31
"""More ranks than any job has."""


def join(where: RankEnvironment, timeout_s: float) -> dist.Store:
    """The store through which the ranks of the job communicate, once all of them are there.

    Args:
        where: this rank.
        timeout_s: the store's own time limit from then on.

    Raises `JoinError` naming the variable, its value and the remedy.
    """
    if where.is_alone:
        return dist.HashStore()
    with naming_variables(where):
        # What ranks have said before torchrun started them again is still in its store.
        store = dist.PrefixStore(f"start_{where.restart}", connect(where))
    try:
        wait_for_all(dist.PrefixStore("join", store), where)
    except dist.DistError as error:
        raise JoinError(
            f"the job's store at {where.address}:{where.port} has ended while rank {where.rank} waited for "
            f"others ({error}): see what the first node prints{where.origin}"
        ) from error
    store.set_timeout(datetime.timedelta(seconds=timeout_s))
    return store


def connect(where: RankEnvironment) -> dist.Store:
    """Open the store, or connect to the one that torchrun or rank 0 has opened.

    Raises `NetworkError`.
    """
    address = reachable_name(where)
    limit_s = ANSWER_S + PER_RANK_S * where.world_size
    who = f"rank {where.rank} on {own_name()} waits for the job's store"
    while True:
        if not where.opens_store:
            wait_for(address, where.port, JOIN_S, who, say if where.local_rank == 0 else lambda _text: None)
        try:
            return open_store(address, where, limit_s)
        except (dist.DistError, RuntimeError, TimeoutError) as error:
            # Rank 0 also listens for a moment to check its own address, before the store is there.
            if where.opens_store or is_listening(address, where.port):
                raise NetworkError(
                    f"what listens at {address}:{where.port} does not answer as a store of torch within "
                    f"{limit_s:g} s: another program has the port"
                ) from error


def open_store(address: str, where: RankEnvironment, limit_s: float) -> dist.Store:
    """torch's store. Raises TimeoutError after `limit_s`: torch itself waits forever for a program that is
    silent."""
    found: list[dist.Store | Exception] = []
    listener = None
    if where.opens_store:
        # The store closes it.
        listener = listen_at(address, where.port, is_alone=where.is_on_one_node).detach()

    def body() -> None:
        try:
            store = dist.TCPStore(
                address,
                where.port,
                is_master=where.opens_store,
                wait_for_workers=False,
                timeout=datetime.timedelta(seconds=limit_s),
                master_listen_fd=listener,
            )
        except (dist.DistError, RuntimeError) as error:
            found.append(error)
        else:
            found.append(store)

    thread = threading.Thread(target=body, daemon=True)
    thread.start()
    thread.join(limit_s)
    if not found:
        raise TimeoutError(f"no answer within {limit_s:g} s")
    if isinstance(found[0], Exception):
        raise found[0]
    return found[0]


def wait_for_all(store: dist.Store, where: RankEnvironment) -> None:
    """Return when every rank of the job is there.

    Raises `JoinError` if two processes are the same rank or count on different numbers of ranks, on all ranks
    that are there; and after `JOIN_S`, naming who is missing.
    """
    # 1. This rank is there, once.
    trouble = contradiction(store, where)
    if trouble is not None:
        # Whoever waits looks for the trouble as soon as the number suffices.
        store.set("trouble", trouble)
        store.add("num_here", ENOUGH)
        raise JoinError(trouble + where.origin)
    store.add("num_here", 1)
    # 2. So are the others.
    start_s, told_s = time.monotonic(), FIRST_PROGRESS_S - PROGRESS_S
    while store.add("num_here", 0) < where.world_size:
        waited_s = time.monotonic() - start_s
        if waited_s >= JOIN_S:
            raise JoinError(f"{missing(store, where)} after {JOIN_S:g} s: see what their nodes print")
        if waited_s - told_s >= PROGRESS_S and where.rank == 0:
            told_s = waited_s
            say(f"waiting for {missing(store, where)}, {waited_s:.0f} of at most {JOIN_S:g} s")
        # A store serves its clients in turn: the more there are, the less often each asks.
        time.sleep(POLL_S * max(1.0, where.world_size / 64))
    if store.check(["trouble"]):
        raise JoinError(store.get("trouble").decode() + where.origin)


def contradiction(store: dist.Store, where: RankEnvironment) -> str | None:
    """Why this rank cannot be of the job of those that are there already; None if it can."""
    counted_on = store.compare_set("world_size", "", str(where.world_size)).decode()
    if counted_on != str(where.world_size):
        return (
            f"WORLD_SIZE={where.world_size} of rank {where.rank} on {own_name()}, but {counted_on} of "
            "another: start every node with the same number of nodes and ranks"
        )
    own = f"{own_name()}, process {os.getpid()}"
    first = store.compare_set(f"rank/{where.rank}", "", own).decode()
    if first != own:
        return (
            f"RANK={where.rank} is there twice, on {first} and on {own}: two nodes have the same number, or "
            f"another job meets at {where.address}:{where.port}"
        )
    return None


def missing(store: dist.Store, where: RankEnvironment) -> str:
    """Which ranks are not there yet, in words."""
    ranks = [rank for rank in range(where.world_size) if not store.check([f"rank/{rank}"])]
    named = ", ".join(map(str, ranks[:8])) + (f" and {len(ranks) - 8} more" if len(ranks) > 8 else "")
    nodes = sorted({rank // where.local_world_size for rank in ranks})
    of_nodes = "" if where.is_on_one_node else f" (of node {', '.join(map(str, nodes[:8]))})"
    return f"{len(ranks)} of {where.world_size} ranks: {named}{of_nodes}"
