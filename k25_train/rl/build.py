"""Puts together what reinforcement learning adds to a run.

Import this module only after `use_platform` has chosen the device: it imports megatron-core.
"""

import asyncio
from collections.abc import Awaitable
from contextlib import AsyncExitStack
from typing import Any

import torch

from k25_train.checkpoint.agreement import on_first_rank
from k25_train.config.rollout import EngineKind
from k25_train.config.schema import Config
from k25_train.data.open_sources import tokenizer_path
from k25_train.data.tokenizer import Tokenizer, load_tokenizer
from k25_train.export.hf_config import SpecialIds
from k25_train.metrics.report import Report
from k25_train.model.megatron_config import TORCH_DTYPE
from k25_train.rl.event_loop import EventLoop
from k25_train.rl.loop import Reinforcement
from k25_train.rl.probe import Probe
from k25_train.rl.room import Parts, Room
from k25_train.rl.sandboxes import check_sandboxes
from k25_train.rl.tasks import TaskOrder
from k25_train.rl.transports.build import build_way
from k25_train.rl.weight_sync import WeightSync
from k25_train.rl.workplace import open_workplace, served_model
from k25_train.rollout.engines.base import Engine
from k25_train.rollout.engines.pool import EnginePool
from k25_train.rollout.engines.remote import connect_engines
from k25_train.training.run import Run

CHECKED_TASKS = 64
"""Training tasks of a source, and held-out ones, that are held against their judges before a run: a sample,
since what is wrong is mostly wrong with all of them. A judge names any other when it comes. Our choice."""


def build_reinforcement(run: Run, report: Report) -> Reinforcement:
    """The hooks of a run of reinforcement learning. Called by every rank; the first one starts engines."""
    config = run.config
    assert config.rollout is not None, "a run of reinforcement learning"
    # 1. What the first rank alone has; if it cannot be had, no rank waits for it.
    rooms: list[Room] = []
    on_first_rank(lambda: rooms.append(_room(run, report)))
    (room,) = rooms or (None,)
    pool, wait = (room.pool, room.wait) if room else (None, _no_engines)

    # 2. What all ranks take part in.
    sync = WeightSync(run, config.rollout.weights, build_way(config, run.topology, pool, wait))
    sequences = room.probe_sequences() if room else []
    media_pad = load_tokenizer(tokenizer_path(config.data)).media_pad
    return Reinforcement(run, room, sync, Probe(run, sequences, media_pad, pool, wait))


def _room(run: Run, report: Report) -> Room:
    loop = EventLoop()
    parts = loop.wait(_furnish(run.config, run.topology.device))
    return Room(run.config, loop, parts, run.checkpoints, report.notice)


async def _furnish(config: Config, device: torch.device) -> Parts:
    rollout, environment = config.rollout, config.environment
    assert rollout is not None and environment is not None
    tasks = TaskOrder(environment, config.train.seed)
    async with AsyncExitStack() as opened:
        # 1. Judges and sandboxes, and whether they do: engines cost more.
        workplace = await open_workplace(config)
        opened.push_async_callback(workplace.close)
        sampled = await asyncio.to_thread(lambda: list(tasks.sampled(CHECKED_TASKS)))
        await asyncio.to_thread(lambda: workplace.judges.check(sampled))
        if any(task.needs_sandbox for task in sampled):
            await check_sandboxes(workplace.services.sandboxes, environment.sandbox.kind)

        # 2. Engines.
        engines = await open_engines(config, workplace.tokenizer, device)
        pool = EnginePool.of(engines, rollout.update_timeout_s)
        opened.push_async_callback(pool.close)
        return Parts(pool=pool, workplace=workplace, tasks=tasks, close=opened.pop_all().aclose)


async def open_engines(config: Config, tokenizer: Tokenizer, device: torch.device) -> list[Engine]:
    """The engines of a run, without weights yet. Raises `EngineError` for what does not answer."""
    rollout = config.rollout
    assert rollout is not None
    if rollout.engine is EngineKind.in_process:
        # transformers takes seconds.
        from k25_train.rollout.engines.in_process.engine import InProcessEngine

        return [
            InProcessEngine(
                config.model,
                ids=SpecialIds.of(tokenizer),
                max_running=rollout.max_running,
                device=device,
                dtype=TORCH_DTYPE[config.train.dtype],
                threads=rollout.threads,
            )
        ]
    return [*await connect_engines(rollout, served_model(config, tokenizer))]


def _no_engines(call: Awaitable[Any]) -> Any:
    raise AssertionError("the first rank alone has engines")
