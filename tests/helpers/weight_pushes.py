"""Pushes of weights from ranks of tests: a checkpoint that is loaded in some layout, and what engines get."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from tests.helpers.ranks import RankContext
from tests.helpers.recording_engine import Digests, RecordingEngine, digests
from tests.helpers.runs import layout, start_run

REINFORCED = (
    "algorithm=k25", "rollout=in_process", "environment=sums", "rollout.max_prompt_tokens=64",
    "rollout.max_tokens=64",
)  # fmt: skip
SHORT = (
    "train.steps=2",
    "checkpoint.interval=2",
    "optim.warmup=1",
    "optim.decay=1",
    "train.eval_sequences=4",
)
INT4 = "model.quantization=int4_qat"
LAYOUTS = {
    "serial, coupled": (layout(), "dep.mode=coupled", "rollout.weights=float32"),
    "pp vpp ep": (layout(pp=2, vpp=2, ep=2, dp=2), "dep.mode=decoupled", "rollout.weights=float32"),
    "cp": (layout(cp=2), "dep.mode=coupled", "rollout.weights=int4", INT4),
    "pp cp": (layout(pp=2, cp=2), "dep.mode=decoupled", "rollout.weights=int4", INT4),
    "dp ep": (layout(dp=2, ep=2), "dep.mode=decoupled", "rollout.weights=bf16", "train.dtype=bfloat16"),
    "experts rounded": (layout(dp=2, ep=2), "dep.mode=coupled", "rollout.weights=float32", INT4),
}


def push_checkpoint(
    context: RankContext, arguments: Sequence[str], checkpoint: Path, transport: str
) -> tuple[Digests, Digests, list[str]]:
    """Load a checkpoint and push it twice to two engines, of which one misses the first push; what both have,
    and what is told."""
    from k25_train.checkpoint.loading import load
    from k25_train.rl.transports.gathered import GatheredWay
    from k25_train.rl.transports.in_memory import InMemory
    from k25_train.rl.transports.shared_memory import SharedMemory
    from k25_train.rl.weight_sync import WeightSync
    from k25_train.rollout.engines.pool import EnginePool

    run = start_run(context, arguments)
    engines = [RecordingEngine("first"), RecordingEngine("second", fails_at=1)]
    pool = EnginePool.of(engines, timeout_s=60) if run.is_main else None  # type: ignore[arg-type]
    made = InMemory() if transport == "in_memory" else SharedMemory(file_bytes=2**16)
    way = GatheredWay(made, pool, asyncio.run)  # type: ignore[arg-type]
    sync = WeightSync(run, run.config.rollout.weights, way)
    with run.data, run.claim:
        load(checkpoint, run.config, run.modules, optimizer=None)
        first = sync.push(1)
        second = sync.push(2)
    assert (first.version, second.version) == (1, 2) and first.num_bytes == second.num_bytes > 0
    sync.close()
    return engines[0].committed[1], engines[1].committed[1], pool.take_events() if pool else []


def expected(checkpoint: Path, arguments: Sequence[str]) -> Digests:
    """What the checkpoint itself has."""
    from dataclasses import replace

    from k25_train.checkpoint.files.stored import StoredCheckpoint
    from k25_train.compose.resolve import compose
    from k25_train.config.rollout import EngineWeights
    from k25_train.export.listing import WeightFormat, released_tensors
    from k25_train.export.stream import as_computed, as_stored, stored_tensors

    config = compose(arguments)
    assert config.rollout is not None
    weights = WeightFormat[config.rollout.weights.value]
    tensors = list(released_tensors(config.model))
    if config.rollout.weights is EngineWeights.float32:
        tensors = [replace(tensor, dtype="float32") for tensor in tensors]
    if config.rollout.weights is EngineWeights.int4:
        tensors = [each if each.is_expert else replace(each, dtype="float32") for each in tensors]
    stream = stored_tensors(StoredCheckpoint.open(checkpoint), tensors)
    if config.rollout.weights is not EngineWeights.int4:
        stream = as_computed(stream, tensors, config.model.quantization)
    return digests(as_stored(stream, tensors, weights))


class NotedSender:
    """vLLM's sender: announces what it then sends; engines must be paused while they load."""

    def __init__(self, source: Any, engine: RecordingEngine) -> None:
        self.source = source
        self.engine = engine

    def send_weights(self) -> None:
        from k25_train.export.stream import NamedTensor

        assert self.engine.is_paused
        announced = self.source.metadata()
        sent = [NamedTensor(name, tensor) for name, tensor in self.source]
        assert [(each.name, each.dtype, each.shape) for each in sent] == [
            (each.name, each.dtype, each.shape) for each in announced
        ]
        self.engine.staged = -1, digests(sent)


class NotedServer:
    """checkpoint-engine's parameter server of one rank, which keeps what is registered."""

    def __init__(self, engine: RecordingEngine) -> None:
        self.engine = engine
        self.calls: list[str] = []
        self.registered: Digests = {}

    def register_checkpoint(self, checkpoint_name: str, *, named_tensors: dict[str, Any]) -> None:
        from k25_train.export.stream import NamedTensor

        self.registered = digests(NamedTensor(name, tensor) for name, tensor in named_tensors.items())
        self.calls.append(f"register {checkpoint_name}")

    def gather_metas(self, checkpoint_name: str) -> None:
        self.calls.append("gather_metas")

    def update(self, checkpoint_name: str, req_func: Any) -> None:
        import torch.distributed as dist

        by_rank: list[Digests] = [{}] * dist.get_world_size()
        dist.all_gather_object(by_rank, self.registered)
        assert self.engine.is_paused or dist.get_rank()
        names = [name for each in by_rank for name in each]
        assert len(names) == len(set(names))
        self.engine.staged = -1, {name: each[name] for each in by_rank for name in each}
        self.calls.append("update")
        req_func([])

    def unregister_checkpoint(self, checkpoint_name: str) -> None:
        self.calls.append("unregister")


def push_from_gpus(
    context: RankContext, arguments: Sequence[str], checkpoint: Path, kind: str
) -> tuple[Digests, int, list[str]]:
    """Push a checkpoint by one of the ways of GPUs, with what takes notes at their ends."""
    from k25_train.checkpoint.loading import load
    from k25_train.rl.transports.checkpoint_engine import CheckpointEngineWay
    from k25_train.rl.transports.nccl import NcclWay, StreamSource
    from k25_train.rl.weight_sync import WeightSync
    from k25_train.rollout.engines.pool import EnginePool

    run = start_run(context, arguments)
    engine = RecordingEngine()
    pool: Any = EnginePool.of([engine], timeout_s=60) if run.is_main else None  # type: ignore[list-item]
    server = NotedServer(engine)
    if kind == "nccl":
        source = StreamSource(run.topology.device)
        way: Any = NcclWay(pool, asyncio.run, source, lambda each: NotedSender(each, engine))
    else:
        way = CheckpointEngineWay(server, lambda sockets: server.calls.append("asked"), pool, asyncio.run)
    sync = WeightSync(run, run.config.rollout.weights, way)
    with run.data, run.claim:
        load(checkpoint, run.config, run.modules, optimizer=None)
        sync.push(1)
        pushed = sync.push(2)
    assert pool is None or (pool.version == 2 and not engine.is_paused)
    return engine.committed[1], pushed.num_bytes, server.calls
