"""Shards as actors of a Ray cluster: a few that live long, one call each, coroutines inside.

    RayStarter ──run()─────► actor: Shard.run on an event loop of that call ◄──ZeroMQ──► first rank
               ──stacks()──►        its control group, with threads of its own

Ray says where shards live and that they have died; all that passes is of `messages.py`. One call for each
rollout would take 54 KB, and calls of control would wait behind them.
"""

import asyncio
import contextlib
import os
import sys
import threading
import traceback
from collections.abc import Callable
from typing import Any

from k25_train.errors import ConfigError
from k25_train.rollout.shards.link import ShardLink
from k25_train.rollout.shards.shard import Shard

CONTROL = "control"
"""Group of calls that do not wait for the one that works."""
END_S = 3.0
"""Time that a shard gets to end by itself. Our choice."""
ADDRESS = "RAY_ADDRESS"


class ShardActor:
    """What an actor does."""

    def __init__(self) -> None:
        self._thread = 0
        self._loop: asyncio.AbstractEventLoop | None = None
        self._task: asyncio.Task[None] | None = None

    def run(self, address: str, key: str, name: str, incarnation: int) -> None:
        """Be a shard until drained, told to stop, or lost. Arguments as `ShardLink` has them."""
        import uvloop

        self._thread = threading.get_ident()
        with contextlib.suppress(asyncio.CancelledError):
            uvloop.run(_run(self._begun, address, name, key, incarnation))

    def _begun(self) -> None:
        self._loop, self._task = asyncio.get_running_loop(), asyncio.current_task()

    def stop(self) -> None:
        """End the call that works; of the control group, so of another thread than its loop's."""
        if self._loop is not None and self._task is not None:
            # An event that another thread sets wakes nobody.
            self._loop.call_soon_threadsafe(self._task.cancel)

    def stacks(self) -> str:
        """Where the event loop is now, for people; of the control group."""
        frame = sys._current_frames().get(self._thread)
        return "".join(traceback.format_stack(frame)) if frame else "it has not begun"


async def _run(begun: Callable[[], None], address: str, name: str, key: str, incarnation: int) -> None:
    """Be a shard. No method of the actor: one that is a coroutine has Ray run all others on a loop, too."""
    begun()
    await Shard(ShardLink(address, name, key)).run(incarnation)


class RayStarter:
    """See `Starter`."""

    def __init__(self, ray: Any, address: str, key: str) -> None:
        """
        Args:
            ray: the module, connected.
            address: to which shards connect.
            key: of the link.
        """
        self._ray, self._address, self._key = ray, address, key
        # A dead one is started again by the first rank, which gives it another name.
        self._class = ray.remote(
            num_cpus=1,
            max_restarts=0,
            max_task_retries=0,
            scheduling_strategy="SPREAD",
            concurrency_groups={CONTROL: 2},
        )(ShardActor)
        self._actors: dict[int, tuple[Any, Any]] = {}
        """Shard -> actor, and the result of its call."""

    async def start(self, shard: int, incarnation: int, name: str) -> None:
        """See `Starter`."""

        def start() -> tuple[Any, Any]:
            actor = self._class.remote()
            return actor, actor.run.remote(self._address, self._key, name, incarnation)

        self._actors[shard] = await asyncio.to_thread(start)

    def is_dead(self, shard: int) -> str:
        """See `Starter`."""
        if shard not in self._actors:
            return "it was not started"
        _, call = self._actors[shard]
        ended, _ = self._ray.wait([call], timeout=0)
        if not ended:
            return ""
        try:
            self._ray.get(call)
        except Exception as error:
            # Ray has many names for an actor that is gone; what the actor itself has raised is the cause.
            cause = getattr(error, "cause", None) or error
            said, _, _ = str(cause).strip().partition("\n")
            return f"{type(cause).__name__}: {said}"
        return "its call has ended"

    async def end(self, shard: int, within_s: float) -> None:
        """See `Starter`."""
        found = self._actors.pop(shard, None)
        if found is not None:
            await asyncio.to_thread(self._end, *found, within_s)

    def _end(self, actor: Any, call: Any, within_s: float) -> None:
        ended, _ = self._ray.wait([call], timeout=within_s)
        if not ended and within_s:
            self._tell_to_stop(actor, call)
        with contextlib.suppress(Exception):
            # One that is dead already.
            self._ray.kill(actor, no_restart=True)

    def _tell_to_stop(self, actor: Any, call: Any) -> None:
        with contextlib.suppress(Exception):
            actor.stop.options(concurrency_group=CONTROL).remote()
            self._ray.wait([call], timeout=END_S)

    async def stacks(self, shard: int) -> str:
        """Where the event loop of a shard is now, for people. Raises as Ray does."""
        actor, _ = self._actors[shard]
        call = actor.stacks.options(concurrency_group=CONTROL).remote()
        text: str = await asyncio.to_thread(lambda: self._ray.get(call, timeout=END_S))
        return text


async def connected(num_shards: int) -> tuple[Any, str]:
    """Ray's module, connected to the cluster of `RAY_ADDRESS`, and this node's address in it.

    Raises `ConfigError` where there is none, or too small a one.
    """
    try:
        import ray
    except ImportError as error:
        raise ConfigError(
            f"rollout.manager.placement=ray: Ray is not installed ({error}): pip install 'k25-train[ray]'"
        ) from error
    address = os.environ.get(ADDRESS)
    if not address:
        raise ConfigError(
            f"rollout.manager.placement=ray: {ADDRESS} is not set: start the run with python -m launch.ray, "
            "or set it to the address of a cluster that there is"
        )

    def connect() -> tuple[float, str]:
        if not ray.is_initialized():
            ray.init(address=address, log_to_driver=True, configure_logging=False)
        return ray.cluster_resources().get("CPU", 0.0), ray.util.get_node_ip_address()

    try:
        processors, own = await asyncio.to_thread(connect)
    except Exception as error:
        # Ray has no base class for what a connection may raise.
        raise ConfigError(
            f"{ADDRESS}={address}: no Ray cluster there ({type(error).__name__}: {error})"
        ) from error
    if processors < num_shards:
        raise ConfigError(
            f"rollout.manager.shards={num_shards}: Ray has {processors:g} processors, and a shard takes one: "
            "use fewer, or more nodes"
        )
    return ray, own
