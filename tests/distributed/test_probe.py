"""Engine and trainer give the probe the same log-probabilities in every layout; other weights are caught."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

from tests.helpers.ranks import RankContext, run_ranks
from tests.helpers.runs import layout, overrides
from tests.helpers.tiny_shards import make_picture

pytestmark = pytest.mark.distributed

REINFORCED = (
    "algorithm=k25", "rollout=in_process", "environment=sums", "rollout.max_prompt_tokens=64",
    "rollout.max_tokens=64", "rollout.probe_tolerance=1e-5",
)  # fmt: skip
LAYOUTS = {
    "pp vpp ep, decoupled": (layout(pp=2, vpp=2, ep=2, dp=2), "dep.mode=decoupled"),
    "serial, coupled": (layout(), "dep.mode=coupled"),
    "cp, coupled": (layout(cp=2), "dep.mode=coupled"),
    "pp cp, bubbles": (layout(pp=2, vpp=2, cp=2), "dep.mode=decoupled", "dep.schedule=bubbles"),
}


def png(width: int, height: int, seed: int) -> bytes:
    """An encoded picture."""
    import io

    buffer = io.BytesIO()
    make_picture(width, height, seed).save(buffer, "PNG")
    return buffer.getvalue()


def probe_twice(context: RankContext, arguments: Sequence[str]) -> dict[str, Any]:
    """Push and probe; then change a weight of the trainer and probe again, without a push."""
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
    from tests.helpers.runs import start_run_on

    run = start_run_on(context, arguments, TrajectorySource)
    words = load_tokenizer(f"{run.config.data.dir}/tokenizer.json")
    ids = SpecialIds(
        bos=words.bos, eos=words.eos, pad=words.pad, media_begin=words.media_begin,
        media_end=words.media_end, media_pad=words.media_pad, turn_end=None,
    )  # fmt: skip
    engines: list[Any] = []
    if run.is_main:
        engines = [
            InProcessEngine(
                run.config.model,
                ids=ids,
                max_running=4,
                device="cpu",
                dtype=torch.float32,
                threads=0,
                name=name,
            )
            for name in ("first", "second")
        ]
    pool: Any = EnginePool.of(engines, timeout_s=60) if run.is_main else None
    text = words.encode("the small red square is next to two circles")
    picture = [words.media_begin, words.media_pad, words.media_end]
    sequences = [
        ProbeSequence((words.bos, *text), ()),
        ProbeSequence((words.bos, *picture, *text[:5], *picture, *text), (png(84, 56, 1), png(56, 112, 2))),
        ProbeSequence((words.bos, *text[3:9]), ()),
    ]
    sync = WeightSync(run, run.config.rollout.weights, GatheredWay(InMemory(), pool, asyncio.run))
    probe = Probe(run, sequences, words.media_pad, pool, asyncio.run)
    found: dict[str, Any] = {}
    with run.data, run.claim:
        sync.push(0)
        found["gap"] = probe.check()
        if run.topology.holds_last_chunk:
            weight = run.chunks[-1].module.language_model.output_layer.weight
            weight.data[7] += 0.01
        try:
            probe.check()
        except EngineError as error:
            found["error"] = str(error)
        found["events"] = pool.take_events() if pool else []
    probe.close()
    for engine in engines:
        asyncio.run(engine.close())
    return found


@pytest.mark.parametrize(
    "name",
    [
        name if name == "pp vpp ep, decoupled" else pytest.param(name, marks=pytest.mark.slow)
        for name in LAYOUTS
    ],
)
def test_engines_give_what_the_trainer_gives(data: Path, tmp_path: Path, name: str) -> None:
    sizes, *more = LAYOUTS[name]
    arguments = overrides(data, tmp_path / "run", *REINFORCED, *sizes, *more)
    world = int(sizes[-1].partition("=")[2])
    by_rank = run_ranks(probe_twice, world, arguments, timeout_s=240.0)
    for found in by_rank:
        assert found["gap"] == by_rank[0]["gap"]
        assert 0 < found["gap"].mean < found["gap"].largest <= 1e-5
        # A weight that the engines do not have: both are off, so that none is left.
        assert "no engine is left" in found["error"] and "probe_tolerance=1e-05" in found["error"]
    assert sorted(event.partition(":")[0] for event in by_rank[0]["events"]) == [
        "first is fenced off", "second is fenced off",
    ]  # fmt: skip
