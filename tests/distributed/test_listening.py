"""Ranks of a job on one host, and its store, listen where this host alone reaches them."""

import os

import pytest

from tests.helpers.ranks import RankContext, run_ranks
from tests.helpers.sockets import is_loopback, listening_addresses

pytestmark = pytest.mark.distributed


def listening(context: RankContext, gloo_interface: str | None) -> set[tuple[str, int]]:
    """Where a rank listens that has talked to all others."""
    import torch
    import torch.distributed as dist

    from k25_train.joining.environment import read_environment
    from k25_train.joining.join import connect
    from parallel.topology import start_process_group

    os.environ.update(context.environment())
    os.environ.pop("GLOO_SOCKET_IFNAME", None)
    if gloo_interface is not None:
        os.environ["GLOO_SOCKET_IFNAME"] = gloo_interface
    store = connect(read_environment())
    start_process_group(
        torch.device("cpu"), 60.0, store=store, rank=context.rank, world_size=context.world_size
    )
    dist.new_group()
    dist.barrier()
    assert os.environ["GLOO_SOCKET_IFNAME"] == (gloo_interface or "lo")
    # Rank 0 of a test holds the store too, where torchrun's agent would.
    assert context.rank or context.port in {port for _, port in listening_addresses()}
    return listening_addresses()


@pytest.mark.parametrize("interface", [None, "lo"])
def test_gloo_listens_on_loopback(interface: str | None) -> None:
    by_rank = run_ranks(listening, 2, interface)

    assert any(by_rank)
    assert [found for rank in by_rank for found in rank if not is_loopback(found[0])] == []
