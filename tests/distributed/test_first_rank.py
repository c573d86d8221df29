"""What the first rank alone does comes to the same on every rank, however it ends: none waits for another."""

from __future__ import annotations

import pytest

from tests.helpers.ranks import RankContext, run_ranks

pytestmark = pytest.mark.distributed


def what_it_comes_to(context: RankContext) -> list[str]:
    """Of a call that returns, one that raises and one that is cancelled."""
    import asyncio
    from contextlib import nullcontext
    from types import SimpleNamespace
    from typing import Any

    import torch

    from k25_train.errors import RolloutError
    from k25_train.rl.event_loop import EventLoop
    from k25_train.rl.first_rank import FirstRank
    from parallel.topology import start_process_group

    start_process_group(torch.device("cpu"), 60.0)

    async def returns(_room: Any) -> str:
        return "done"

    async def raises(_room: Any) -> str:
        raise RolloutError("nothing rolled out")

    async def is_cancelled(_room: Any) -> str:
        raise asyncio.CancelledError

    run: Any = SimpleNamespace(
        topology=SimpleNamespace(world_size=context.world_size, device=torch.device("cpu")),
        tracker=SimpleNamespace(phase=lambda *_, **__: nullcontext()),
        config=SimpleNamespace(train=SimpleNamespace(collective_timeout_s=4.0)),
    )
    room: Any = EventLoop() if context.rank == 0 else None
    first_rank, found = FirstRank(run, room), []
    for call in (returns, raises, is_cancelled):
        try:
            found.append(first_rank.does("test", call))
        except Exception as error:
            found.append(f"{type(error).__name__}: {error}")
    if room is not None:
        room.close()
    return found


def test_every_rank_returns_or_raises_what_the_first_one_does() -> None:
    ended = ["done", "RolloutError: nothing rolled out", "CheckpointError: rank 0: CancelledError: "]
    assert run_ranks(what_it_comes_to, 2, timeout_s=60.0) == [ended, ended]
