"""Acts as any rank of a job of any size, in one process, to see what that rank would build.

torch's fake backend forms groups without peers and its collectives move nothing between ranks, so that only
construction is possible, never a step.
"""

import contextlib
from collections.abc import Iterator
from typing import Any

import torch
import torch.distributed as dist
from torch.testing._internal.distributed.fake_pg import FakeStore

from parallel.topology import backend_of, stop_process_group

GroupsOfWorld = dict[str, list[tuple[int, ...]]]
"""megatron-core's description of a kind of group -> the global ranks of every group of that kind."""


@contextlib.contextmanager
def fake_rank(rank: int, world_size: int) -> Iterator[GroupsOfWorld]:
    """Within: this process is `rank` of `world_size`.

    Yields all groups that are created within, including those without this rank: forming groups is
    collective, so one rank's construction creates the groups of all.
    """
    created: GroupsOfWorld = {}
    new_group = dist.new_group

    def create(ranks: list[int] | None = None, *args: Any, **kwargs: Any) -> Any:
        members = range(world_size) if ranks is None else ranks
        created.setdefault(str(kwargs.get("group_desc")), []).append(tuple(members))
        return new_group(ranks, *args, **kwargs)

    backend = backend_of(torch.device("meta"))
    dist.init_process_group(backend, store=FakeStore(), rank=rank, world_size=world_size)
    dist.new_group = create
    try:
        yield created
    finally:
        dist.new_group = new_group
        stop_process_group()
