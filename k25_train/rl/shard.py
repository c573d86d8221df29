"""What a shard of a run is built from: judges, environments and prompts of its own, engines of the first rank
or those of `rollout.urls`."""

import tempfile
from collections import Counter
from pathlib import Path
from typing import Any

from k25_train.compose.resolve import load
from k25_train.config.rollout import EngineKind
from k25_train.config.schema import Config
from k25_train.rl.workplace import Workplace, open_workplace, rollouts_at
from k25_train.rollout.asking import Generates
from k25_train.rollout.engines.pool import EnginePool
from k25_train.rollout.engines.remote import connect_engines
from k25_train.rollout.local import LocalRollouts
from k25_train.rollout.manager.engines_seen import NoEngines
from k25_train.rollout.records import Record
from k25_train.rollout.shards.shard import Shard
from k25_train.rollout.work import Append, Work

BUILD = "k25_train.rl.shard:build"
"""Names this to shards."""


class ShardRollouts:
    """See `Rollouts`: those of one shard, with what they hold."""

    def __init__(self, rollouts: LocalRollouts, workplace: Workplace, pool: EnginePool | None) -> None:
        self._rollouts, self._workplace, self._pool = rollouts, workplace, pool

    async def respond(self, work: Work, append: Append) -> None:
        """See `Rollouts`."""
        await self._rollouts.respond(work, append)

    async def announce(self, version: int) -> None:
        """See `Rollouts`."""
        await self._rollouts.announce(version)

    async def close(self) -> None:
        """See `Rollouts`."""
        await self._rollouts.close()
        await self._workplace.close()
        if self._pool is not None:
            await self._pool.close()


def begin_message(config_text: str) -> Record:
    """What a shard begins with; `config_text`: the configuration, as `to_yaml` writes it."""
    return Record({"kind": "begin", "build": BUILD, "arguments": {"config": config_text}})


async def build(shard: Shard, arguments: dict[str, Any]) -> ShardRollouts:
    """Build what a shard works with. Raises as what it opens."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "config.yaml"
        path.write_text(arguments["config"], encoding="ascii")
        config = load(path).config
    counts: Counter[str] = Counter()
    assert config.rollout is not None
    workplace = await open_workplace(config, config.rollout.manager.shards)
    pool = await _pool_of(config, workplace, shard)
    engines: Generates = pool or shard.engines
    rollouts = rollouts_at(
        config,
        workplace,
        engines,
        seen=pool or NoEngines(),
        shards=config.rollout.manager.shards,
        count=lambda name: counts.update((name,)),
        notice=shard.notice,
    )
    shard.tells(lambda: {"counts": dict(counts), "snapshot": rollouts.manager.snapshot().to_json()})
    return ShardRollouts(rollouts, workplace, pool)


async def _pool_of(config: Config, workplace: Workplace, shard: Shard) -> EnginePool | None:
    """Servers that the shard asks itself; None where the first rank has the engine."""
    rollout = config.rollout
    assert rollout is not None
    if rollout.engine is EngineKind.in_process:
        return None
    engines = await connect_engines(rollout, workplace.model)
    pool = EnginePool.of(engines, rollout.update_timeout_s)
    pool.follows = True

    def announced(version: int) -> None:
        for engine in engines:
            engine.follow(version)
        pool.follow(version)

    shard.follows(announced)
    return pool
