"""Ranks of a job on one host listen where this host alone reaches them."""

import os

import pytest

from tests.helpers.ranks import RankContext, run_ranks
from tests.helpers.sockets import is_loopback, listening_addresses

pytestmark = pytest.mark.distributed


def listening(context: RankContext, gloo_interface: str | None) -> set[tuple[str, int]]:
    """Where a rank listens that has talked to all others."""
    import torch
    import torch.distributed as dist

    from parallel.topology import start_process_group

    os.environ.update(context.environment())
    os.environ.pop("GLOO_SOCKET_IFNAME", None)
    if gloo_interface is not None:
        os.environ["GLOO_SOCKET_IFNAME"] = gloo_interface
    start_process_group(torch.device("cpu"), timeout_s=60.0)
    dist.new_group()
    dist.barrier()
    assert os.environ["GLOO_SOCKET_IFNAME"] == (gloo_interface or "lo")
    # Rank 0 of a test holds the store, which torch opens; torchrun's agent does otherwise (launch.agent).
    return {found for found in listening_addresses() if found[1] != context.port}


@pytest.mark.parametrize("interface", [None, "lo"])
def test_gloo_listens_on_loopback(interface: str | None) -> None:
    by_rank = run_ranks(listening, 2, interface)

    assert any(by_rank)
    assert [found for rank in by_rank for found in rank if not is_loopback(found[0])] == []
