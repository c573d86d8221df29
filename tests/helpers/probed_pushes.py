"""Pushes of the tiny model of `model=k25_tiny` to the engine in process, each proven by the probe."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from typing import Any, NamedTuple

from tests.helpers.ranks import RankContext
from tests.helpers.runs import start_run_on

TINY = (
    "experiment=smoke", "parallelism=serial", "cluster.gpus_per_node=1", "algorithm=k25",
    "rollout=in_process", "environment=sums", "rollout.probe_tolerance=1e-5", "data.read_in=thread",
    "run.dir=/tmp/k25_probed_pushes",
)  # fmt: skip
PUSHES = 5


class ProbedPushes(NamedTuple):
    """What was measured."""

    seconds: tuple[float, ...]
    """Of each push."""
    gap: float
    """Largest difference of a log-probability after any of them, in nats."""
    noticed: bool
    """Whether the probe fences the engine off once the trainer has a weight that it has not."""


def probed_pushes(context: RankContext, arguments: Sequence[str]) -> ProbedPushes:
    """Push and probe a few times; then change the trainer without a push."""
    import torch

    from k25_train.data.tokenizer import load_tokenizer
    from k25_train.data.trajectories.source import TrajectorySource
    from k25_train.export.hf_config import SpecialIds
    from k25_train.rl.probe import Probe
    from k25_train.rl.transports.gathered import GatheredWay
    from k25_train.rl.transports.in_memory import InMemory
    from k25_train.rl.weight_sync import WeightSync
    from k25_train.rollout.engines.base import EngineError, ProbeSequence
    from k25_train.rollout.engines.in_process.engine import InProcessEngine
    from k25_train.rollout.engines.pool import EnginePool

    run = start_run_on(context, arguments, TrajectorySource)
    words = load_tokenizer(f"{run.config.data.dir}/tokenizer.json")
    engine: Any = InProcessEngine(
        run.config.model,
        ids=SpecialIds.of(words),
        max_running=4,
        device="cpu",
        dtype=torch.float32,
        threads=0,
    )
    pool = EnginePool.of([engine], timeout_s=60)
    sync = WeightSync(run, run.config.rollout.weights, GatheredWay(InMemory(), pool, asyncio.run))
    texts = ("import os and then sys", "the square is red", "3 + 4 = 7, and 7 + 5 = 12")
    sequences = [ProbeSequence((words.bos, *words.encode(text)), ()) for text in texts]
    probe = Probe(run, sequences, words.media_pad, pool, asyncio.run)
    with run.data, run.claim:
        pushes = [(sync.push(version), probe.check()) for version in range(PUSHES)]
        run.chunks[-1].module.language_model.output_layer.weight.data[7] += 0.01
        try:
            probe.check()
            noticed = False
        except EngineError:
            noticed = True
    probe.close()
    asyncio.run(engine.close())
    seconds = tuple(push.sync_s for push, _ in pushes)
    return ProbedPushes(seconds, max(gap.largest for _, gap in pushes), noticed)
