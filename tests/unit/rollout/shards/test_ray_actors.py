"""Shards as actors: what Ray is asked for, and what it says of those that died; with Ray itself, slowly."""

import asyncio
import os
import signal
import threading
import time
from pathlib import Path
from typing import Any

import psutil
import pytest

from k25_train.environments.base import Task
from k25_train.errors import ConfigError
from k25_train.rollout.engines.pool import EnginePool
from k25_train.rollout.records import Record
from k25_train.rollout.response_records import apply_record
from k25_train.rollout.shards import ray_actors
from k25_train.rollout.shards.link import FirstRankLink, ShardLink
from k25_train.rollout.shards.ray_actors import RayStarter, ShardActor, connected
from k25_train.rollout.shards.rollouts import ShardedRollouts
from k25_train.rollout.trajectory import Response
from k25_train.rollout.work import Round, Work
from tests.helpers.scripted_engine import ScriptedEngine
from tests.helpers.shard_job import BUILD


class FakeRay:
    """Actors without processes: their calls end when they are told to, or killed."""

    def __init__(self) -> None:
        self.options: dict[str, Any] = {}
        self.ended: dict[int, Exception | None] = {}
        self.killed: list[int] = []
        self.started: list[tuple[Any, ...]] = []
        self.deaf: set[int] = set()

    def remote(self, **options: Any) -> Any:
        self.options = options
        return lambda _: type("Class", (), {"remote": lambda: FakeActor(self)})

    def wait(self, calls: list[int], timeout: float) -> tuple[list[int], list[int]]:
        return [call for call in calls if call in self.ended], []

    def get(self, call: int, timeout: float = 0) -> None:
        if (error := self.ended[call]) is not None:
            raise error

    def kill(self, actor: "FakeActor", no_restart: bool) -> None:
        assert no_restart
        self.killed.append(actor.number)


class FakeActor:
    """One of them."""

    def __init__(self, ray: FakeRay) -> None:
        self.ray, self.number = ray, len(ray.started)

    @property
    def run(self) -> Any:
        return type("Run", (), {"remote": lambda *arguments: self._run(arguments)})

    def _run(self, arguments: tuple[Any, ...]) -> int:
        self.ray.started.append(arguments)
        return self.number

    @property
    def stop(self) -> Any:
        def remote() -> None:
            if self.number not in self.ray.deaf:
                self.ray.ended[self.number] = None

        def options(concurrency_group: str) -> Any:
            assert concurrency_group in self.ray.options["concurrency_groups"]
            return type("Stop", (), {"remote": staticmethod(remote)})

        return type("Stop", (), {"options": staticmethod(options)})


def test_an_actor_has_one_call_and_no_second_life_of_ray() -> None:
    ray = FakeRay()
    starter = RayStarter(ray, "tcp://a:1", "key")
    assert (ray.options["max_restarts"], ray.options["max_task_retries"]) == (0, 0)
    assert starter.is_dead(0) == "it was not started"
    asyncio.run(starter.start(0, 2, "shard 0.2"))
    assert ray.started == [("tcp://a:1", "key", "shard 0.2", 2)] and starter.is_dead(0) == ""


def test_what_an_actor_died_of_is_named() -> None:
    class TaskError(Exception):
        cause = ValueError("no such module\nbelow")

    ray = FakeRay()
    starter = RayStarter(ray, "tcp://a:1", "key")
    asyncio.run(starter.start(0, 0, "shard 0.0"))
    ray.ended[0] = TaskError("a traceback of a hundred lines")
    assert starter.is_dead(0) == "ValueError: no such module"
    ray.ended[0] = RuntimeError("")
    assert starter.is_dead(0) == "RuntimeError: "
    ray.ended[0] = None
    assert starter.is_dead(0) == "its call has ended"


@pytest.mark.parametrize("is_deaf", [False, True])
def test_an_actor_is_told_to_stop_and_killed_at_last(is_deaf: bool) -> None:
    ray = FakeRay()
    ray.deaf = {0} if is_deaf else set()
    starter = RayStarter(ray, "tcp://a:1", "key")
    asyncio.run(starter.start(0, 0, "shard 0.0"))
    asyncio.run(starter.end(0, 1.0))
    asyncio.run(starter.end(0, 1.0))
    assert ray.killed == [0] and (0 in ray.ended) is not is_deaf


def test_a_stop_from_another_thread_ends_the_call() -> None:
    actor = ShardActor()

    async def sleeps(begun: Any, *_: Any) -> None:
        begun()
        await asyncio.sleep(60)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(ray_actors, "_run", sleeps)
        thread = threading.Thread(target=actor.run, args=("", "", "", 0))
        thread.start()
        while "sleeps" not in actor.stacks() and actor._loop is None:
            time.sleep(0.01)
        actor.stop()
        thread.join(20)
    assert not thread.is_alive()


def test_no_method_of_an_actor_is_a_coroutine() -> None:
    # Ray would run all of them on one loop, and the one that works has a loop of its own.
    assert not [name for name in dir(ShardActor) if asyncio.iscoroutinefunction(getattr(ShardActor, name))]


def test_without_a_cluster_the_remedy_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("ray")
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    with pytest.raises(ConfigError, match=r"python -m launch\.ray"):
        asyncio.run(connected(2))


def test_over_tcp_nobody_is_heard_without_the_key() -> None:
    async def heard(key_of: Any) -> list[bytes]:
        link = FirstRankLink("tcp://127.0.0.1")
        shard = ShardLink(link.address, "shard 0.0", key_of(link))
        try:
            await shard.send(Record({"kind": "hello"}))
            async with asyncio.timeout(1):
                return [(await link.receive())[0]]
        except TimeoutError:
            return []
        finally:
            shard.close()
            link.close()

    assert asyncio.run(heard(lambda link: link.key)) == [b"shard 0.0"]
    assert asyncio.run(heard(lambda link: "")) == []


@pytest.mark.slow
def test_actors_that_are_killed_are_started_again_and_every_response_ends_once(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    ray = pytest.importorskip("ray")
    monkeypatch.setenv("RAY_AUTH_MODE", "disabled")
    ray.init(address="local", include_dashboard=False, num_cpus=2, object_store_memory=80 * 2**20)
    try:
        asyncio.run(_disturbed(ray))
    finally:
        ray.shutdown()


async def _disturbed(ray: Any) -> None:
    link, pool = FirstRankLink("tcp://127.0.0.1"), EnginePool.of([ScriptedEngine()], 5.0)
    begin = Record({"kind": "begin", "build": BUILD, "arguments": {"turns": 5, "pause_s": 0.1}})
    starter, told, kinds = RayStarter(ray, link.address, link.key), list[str](), dict[int, list[str]]()
    rollouts = ShardedRollouts(
        link, starter, 2, begin, pool, count=lambda _: None, notice=told.append, stuck_s=2.0
    )
    await pool.update([], 0)
    await rollouts.start()

    async def respond(group: int) -> None:
        work = Work(
            task=Task(key="t", family="t", messages=(), judge="j"), group=group, sample=0, seed=group,
            source="s", allowed=Round(number=0), response=Response(), media={},
        )  # fmt: skip

        def append(record: Record) -> None:
            kinds.setdefault(group, []).append(record.header["kind"])
            apply_record(record, work.response, work.media)

        await rollouts.respond(work, append)

    async def kill() -> None:
        while len(kinds) < 20:
            await asyncio.sleep(0.02)
        assert "run" in await starter.stacks(1)
        actors = [each for each in psutil.process_iter(["cmdline"]) if _is_shard(each)]
        os.kill(actors[0].pid, signal.SIGKILL)

    async with asyncio.timeout(120):
        await asyncio.gather(*map(respond, range(40)), kill())
        await rollouts.close()
    assert all(each.count("ended") == each.count("judged") == 1 for each in kinds.values())
    assert all(each.count("segment") == 5 for each in kinds.values()) and len(kinds) == 40
    assert sum("is dead" in text for text in told) == 1


def _is_shard(process: Any) -> bool:
    return any("ShardActor" in text for text in process.info["cmdline"] or ())
