"""Sets up every communicator before the first step, so that none is first met in the middle of one.

NCCL makes a communicator when it is first used, and connects its ranks for each kind of operation when that
is first used; meanwhile the host waits for the others. In the middle of a step that looks like a hang, and
ranks that do so in different orders wait for each other in a circle. Here all do it in one order, each in a
phase that names the ranks it waits for.
"""

import time
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager

import torch
import torch.distributed as dist
from torch import Tensor

from parallel.communicators import Communicator, Operation, Sends, neighbours
from parallel.topology import Topology

Phase = Callable[[str, Sequence[int]], AbstractContextManager[object]]
"""Context that announces what a rank waits for, and the global ranks that it waits for."""

LARGE = 2**24
"""Elements with which NCCL chooses the algorithms of large messages: 64 MB in float32."""


def set_up(
    topology: Topology, communicators: Sequence[Communicator], phase: Phase, say: Callable[[str], None]
) -> None:
    """Use each communicator once for all that it carries. Called by every rank, with the same list.

    Args:
        topology: this rank's groups.
        communicators: what `parallel.communicators.communicators_of` lists.
        phase: announces what this rank waits for.
        say: prints a line; used by rank 0.
    """
    width = max((len(each.name) for each in communicators), default=0)
    for each in communicators:
        group = topology.group(each.group)
        ranks = dist.get_process_group_ranks(group)
        started_s = time.monotonic()
        with phase(f"set up communicator of {each.name}", ranks):
            meet(each, group, topology)
            if topology.device.type == "cuda":
                torch.cuda.synchronize(topology.device)
        if topology.rank == 0:
            took_s = time.monotonic() - started_s
            say(f"communicator of {each.name:<{width}} {len(ranks):>6,} ranks {took_s:>7.2f} s")


def meet(each: Communicator, group: dist.ProcessGroup, topology: Topology) -> None:
    """Do once what this communicator carries, small and, on CUDA, large."""
    sizes = (1, LARGE) if topology.device.type == "cuda" else (1,)
    for size in sizes:
        rows = -(-size // group.size())
        for operation in each.operations:
            _OPERATIONS[operation](group, rows, topology.device)
    if each.sends is not Sends.none:
        # All but what goes around among those that share sequences is the pipeline's.
        ring = group if group is topology.groups.cp else topology.groups.pp
        for peer in neighbours(topology.rank, dist.get_process_group_ranks(ring)):
            _send_both_ways(peer, group, topology, is_batched=each.sends is Sends.batched)


def _send_both_ways(peer: int, group: dist.ProcessGroup, topology: Topology, *, is_batched: bool) -> None:
    to_send, to_fill = _buffer(1, topology.device), _buffer(1, topology.device)
    if is_batched:
        operations = [
            dist.P2POp(dist.isend, to_send, peer, group),
            dist.P2POp(dist.irecv, to_fill, peer, group),
        ]
        for work in dist.batch_isend_irecv(operations):
            work.wait()
        return
    # A pair shares one stream: the lower rank sends first, the higher one receives first.
    if topology.rank < peer:
        dist.send(to_send, peer, group)
        dist.recv(to_fill, peer, group)
    else:
        dist.recv(to_fill, peer, group)
        dist.send(to_send, peer, group)


def _buffer(size: int, device: torch.device) -> Tensor:
    return torch.zeros(size, device=device)


def _all_reduce(group: dist.ProcessGroup, rows: int, device: torch.device) -> None:
    dist.all_reduce(_buffer(rows * group.size(), device), group=group)


def _all_gather(group: dist.ProcessGroup, rows: int, device: torch.device) -> None:
    dist.all_gather_into_tensor(_buffer(rows * group.size(), device), _buffer(rows, device), group=group)


def _reduce_scatter(group: dist.ProcessGroup, rows: int, device: torch.device) -> None:
    dist.reduce_scatter_tensor(_buffer(rows, device), _buffer(rows * group.size(), device), group=group)


def _all_to_all(group: dist.ProcessGroup, rows: int, device: torch.device) -> None:
    size = rows * group.size()
    dist.all_to_all_single(_buffer(size, device), _buffer(size, device), group=group)


def _broadcast(group: dist.ProcessGroup, rows: int, device: torch.device) -> None:
    dist.broadcast(_buffer(rows * group.size(), device), dist.get_global_rank(group, 0), group=group)


_OPERATIONS: dict[Operation, Callable[[dist.ProcessGroup, int, torch.device], None]] = {
    Operation.all_reduce: _all_reduce,
    Operation.all_gather: _all_gather,
    Operation.reduce_scatter: _reduce_scatter,
    Operation.all_to_all: _all_to_all,
    Operation.broadcast: _broadcast,
}
