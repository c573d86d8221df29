"""Where the rollouts of a run live: on the first rank's event loop, in processes next to it, or on Ray."""

import tempfile
from collections.abc import Callable
from pathlib import Path

from k25_train.compose.resolve import to_yaml
from k25_train.config.rollout_manager import ManagerConfig, Placement
from k25_train.config.schema import Config
from k25_train.rl.shard import begin_message
from k25_train.rl.workplace import Workplace, rollouts_at
from k25_train.rollout.engines.pool import EnginePool
from k25_train.rollout.shards.link import FirstRankLink, local_address
from k25_train.rollout.shards.members import Starter
from k25_train.rollout.shards.processes import ProcessStarter
from k25_train.rollout.shards.ray_actors import RayStarter, connected
from k25_train.rollout.shards.rollouts import ShardedRollouts
from k25_train.rollout.work import Rollouts


async def open_rollouts(
    config: Config,
    workplace: Workplace,
    pool: EnginePool,
    *,
    count: Callable[[str], None],
    notice: Callable[[str], None],
) -> Rollouts:
    """The rollouts of a run, where `rollout.manager.placement` says.

    Args:
        config: of the run.
        workplace: of the first rank.
        pool: engines of the first rank.
        count: told what has happened, by kind.
        notice: tells what there is to know.
    """
    assert config.rollout is not None
    manager = config.rollout.manager
    if manager.placement is Placement.in_process:
        return rollouts_at(config, workplace, pool, seen=pool, shards=1, count=count, notice=notice)
    link, starter = await _linked(manager)
    rollouts = ShardedRollouts(
        link,
        starter,
        manager.shards,
        begin_message(to_yaml(config)),
        pool,
        count=count,
        notice=notice,
        stuck_s=manager.stuck_s,
    )
    await rollouts.start()
    return rollouts


async def _linked(manager: ManagerConfig) -> tuple[FirstRankLink, Starter]:
    """The first rank's end of what it has with shards, and what starts them."""
    if manager.placement is Placement.ray:
        ray, own = await connected(manager.shards)
        link = FirstRankLink(f"tcp://{own}")
        return link, RayStarter(ray, link.address, link.key)
    # Of this user alone.
    folder = Path(tempfile.mkdtemp(prefix="k25_shards_"))
    link = FirstRankLink(local_address(folder), folder)
    return link, ProcessStarter(link.address)
