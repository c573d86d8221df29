"""What the first rank alone does, however long it takes, while all others wait for it.

A collective that waits longer than `train.collective_timeout_s` ends the job, and rollouts may take an hour.
So the ranks meet again and again, until the first one is done.
"""

from collections.abc import Callable, Coroutine
from concurrent.futures import Future, wait
from typing import Any

import torch
import torch.distributed as dist

from k25_train.checkpoint.agreement import on_first_rank
from k25_train.rl.room import Room
from k25_train.training.run import Run

LONGEST_BEAT_S = 10.0
"""Longest time between two meetings. Our choice."""


class FirstRank:
    """Every rank calls every method, in the same order."""

    def __init__(self, run: Run, room: Room | None) -> None:
        """`room`: the first rank's; None on others."""
        self._run = run
        self._room = room
        self._beat_s = min(LONGEST_BEAT_S, run.config.train.collective_timeout_s / 4)

    def does[T](self, phase: str, call: Callable[[Room], Coroutine[Any, Any, T]]) -> T:
        """What a coroutine of the first rank's room comes to, on every rank; raises what it raises.

        What it returns is sent to all: keep it small.
        """
        topology, tracker = self._run.topology, self._run.tracker
        started: list[Future[Any]] = []
        with tracker.phase(phase, range(topology.world_size), may_be_long=True):
            if self._room is not None:
                started.append(self._room.submit(call(self._room)))
            while not self._is_done(started):
                pass
            return on_first_rank(lambda: started[0].result())

    def _is_done(self, started: list[Future[Any]]) -> bool:
        """Whether the first rank is done; returns after a beat if it is not. Alone it waits to the end."""
        topology = self._run.topology
        if topology.world_size == 1:
            return True
        # Whatever became of it, others are told: only what it comes to may raise, and on all ranks.
        done = wait(started, self._beat_s).done if started else ()
        is_done = torch.tensor([len(done)], dtype=torch.int64, device=topology.device)
        dist.broadcast(is_done, 0)
        return bool(is_done.item())
