"""What a manager asks of engines, and what it saw last."""

from collections.abc import Mapping
from typing import Protocol

from k25_train.rollout.engines.base import EngineState
from k25_train.rollout.manager.snapshot import EngineUse


class Engines(Protocol):
    """Engines of one policy; `engines.pool.EnginePool` is one."""

    version: int
    """Of the weights that all of them sample from; -1 for none."""

    async def states(self) -> dict[str, EngineState]:
        """Name of each serving engine -> how it is. Raises `EngineError` if there is none."""

    def fenced(self) -> dict[str, str]:
        """Name of each engine that gets no requests -> why."""


class NoEngines:
    """Nothing is known of engines: the cap stays where it is."""

    version = -1

    async def states(self) -> dict[str, EngineState]:
        """None."""
        return {}

    def fenced(self) -> dict[str, str]:
        """None."""
        return {}


def engine_uses(states: Mapping[str, EngineState], fenced: Mapping[str, str]) -> dict[str, EngineUse]:
    """Engines as a snapshot has them."""
    found = {
        name: EngineUse(
            version=state.version,
            running=state.running,
            waiting=state.waiting,
            kv_use=state.kv_use,
            busy_share=state.busy_share,
        )
        for name, state in states.items()
    }
    lost = {
        name: EngineUse(version=-1, running=0, waiting=0, kv_use=0.0, busy_share=0.0, fenced=why)
        for name, why in fenced.items()
    }
    return found | lost
