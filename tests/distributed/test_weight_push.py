"""Whatever the layout of the trainer, engines get the same bits."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from pathlib import Path

import pytest

from tests.helpers.ranks import RankContext, run_ranks
from tests.helpers.recording_engine import Digests, RecordingEngine, digests
from tests.helpers.runs import fit, layout, overrides, start_run

pytestmark = pytest.mark.distributed

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
LAYOUTS = {
    "serial, coupled": (layout(), "dep.mode=coupled", "rollout.weights=float32"),
    "pp vpp ep": (layout(pp=2, vpp=2, ep=2, dp=2), "dep.mode=decoupled", "rollout.weights=float32"),
    "cp": (layout(cp=2), "dep.mode=coupled", "rollout.weights=int4"),
    "pp cp": (layout(pp=2, cp=2), "dep.mode=decoupled", "rollout.weights=int4"),
    "dp ep": (layout(dp=2, ep=2), "dep.mode=decoupled", "rollout.weights=bf16"),
}


def push_checkpoint(
    context: RankContext, arguments: Sequence[str], checkpoint: Path, transport: str
) -> tuple[Digests, Digests, list[str]]:
    """Load a checkpoint and push it twice to two engines, of which one misses the first push; what both have,
    and what is told."""
    from k25_train.checkpoint.loading import load
    from k25_train.rl.transports.in_memory import InMemory
    from k25_train.rl.transports.shared_memory import SharedMemory
    from k25_train.rl.weight_sync import WeightSync
    from k25_train.rollout.engines.pool import EnginePool

    run = start_run(context, arguments)
    engines = [RecordingEngine("first"), RecordingEngine("second", fails_at=1)]
    pool = EnginePool.of(engines, timeout_s=60) if run.is_main else None  # type: ignore[arg-type]
    way = InMemory() if transport == "in_memory" else SharedMemory(shard_bytes=2**16)
    sync = WeightSync(run, way, pool, asyncio.run)  # type: ignore[arg-type]
    with run.data, run.claim:
        load(checkpoint, run.config, run.modules, optimizer=None)
        first = sync.push(1)
        second = sync.push(2)
    assert (first.version, second.version) == (1, 2) and first.num_bytes == second.num_bytes > 0
    sync.close()
    return engines[0].committed[1], engines[1].committed[1], pool.take_events() if pool else []


@pytest.fixture(scope="module")
def checkpoint(data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Of a short run."""
    folder = tmp_path_factory.mktemp("pushed")
    run_ranks(fit, 1, overrides(data, folder / "run", *SHORT, *layout()), timeout_s=240.0)
    return folder / "run/checkpoints/step_2"


def expected(checkpoint: Path, arguments: Sequence[str]) -> Digests:
    """What the checkpoint itself has."""
    from dataclasses import replace

    from k25_train.checkpoint.files.stored import StoredCheckpoint
    from k25_train.compose.resolve import compose
    from k25_train.config.rollout import EngineWeights
    from k25_train.export.listing import WeightFormat, released_tensors
    from k25_train.export.stream import as_stored, stored_tensors

    config = compose(arguments)
    assert config.rollout is not None
    weights = WeightFormat[config.rollout.weights.value]
    tensors = list(released_tensors(config.model))
    if config.rollout.weights is EngineWeights.float32:
        tensors = [replace(tensor, dtype="float32") for tensor in tensors]
    return digests(as_stored(stored_tensors(StoredCheckpoint.open(checkpoint), tensors), tensors, weights))


@pytest.mark.parametrize("transport", ["in_memory", "shared_memory"])
@pytest.mark.parametrize(
    "name", [name if name == "pp vpp ep" else pytest.param(name, marks=pytest.mark.slow) for name in LAYOUTS]
)
def test_engines_get_the_bits_of_the_checkpoint(
    data: Path, tmp_path: Path, checkpoint: Path, name: str, transport: str
) -> None:
    sizes, *more = LAYOUTS[name]
    arguments = overrides(data, tmp_path / "run", *SHORT, *REINFORCED, *sizes, *more)
    world = int(sizes[-1].partition("=")[2])
    by_rank = run_ranks(push_checkpoint, world, arguments, checkpoint, transport, timeout_s=240.0)
    first, second, events = by_rank[0]
    assert first == second == expected(checkpoint, arguments)
    assert [text.partition(":")[0] for text in events] == [
        "second is fenced off", "second serves version 1 again; it was fenced off",
    ]  # fmt: skip
    assert all(not others[0] for others in by_rank[1:])
