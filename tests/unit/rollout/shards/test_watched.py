"""What the first rank makes of shards that are slow, silent or full, without any."""

import asyncio
from collections import Counter
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import zmq
import zmq.asyncio

from k25_train.environments.base import Task
from k25_train.errors import RolloutError
from k25_train.rollout.engines.pool import EnginePool
from k25_train.rollout.records import Record
from k25_train.rollout.shards import link as link_module
from k25_train.rollout.shards import rollouts as module
from k25_train.rollout.shards.link import FirstRankLink, local_address, message_in
from k25_train.rollout.shards.rollouts import ShardedRollouts
from k25_train.rollout.trajectory import Response
from k25_train.rollout.work import Round, Work
from tests.helpers.scripted_engine import ScriptedEngine

SILENT_S = 0.2


class Wire:
    """See `Link`: what the test says is received."""

    def __init__(self) -> None:
        self.sent: list[tuple[bytes, str]] = []
        self.said: asyncio.Queue[tuple[bytes, Record]] = asyncio.Queue()

    async def send(self, peer: bytes, message: Record) -> None:
        self.sent.append((peer, message.header["kind"]))

    async def receive(self) -> tuple[bytes, Record]:
        return await self.said.get()

    def close(self) -> None:
        pass


class Starts:
    """See `Starter`: counts."""

    def __init__(self) -> None:
        self.names: list[str] = []

    async def start(self, shard: int, incarnation: int, name: str) -> None:
        self.names.append(name)

    def is_dead(self, shard: int) -> str:
        return ""

    async def end(self, shard: int, within_s: float) -> None:
        pass


Use = Callable[[ShardedRollouts, Wire, Starts, "Counter[str]"], Awaitable[Any]]


def run(use: Use, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "SILENT_S", SILENT_S)
    monkeypatch.setattr(module, "ALIVE_S", SILENT_S / 10)

    async def inside() -> None:
        wire, starts, counts = Wire(), Starts(), Counter[str]()
        rollouts = ShardedRollouts(
            wire, starts, 1, Record({"kind": "begin"}), EnginePool.of([ScriptedEngine()], 5.0),
            stuck_s=60.0,
            count=lambda kind: counts.update([kind]), notice=lambda text: None,
        )  # fmt: skip
        await rollouts.start()
        try:
            async with asyncio.timeout(30):
                await use(rollouts, wire, starts, counts)
        finally:
            await rollouts.close()

    asyncio.run(inside())


def said(kind: str, **header: Any) -> tuple[bytes, Record]:
    return b"shard 0.0", Record({"kind": kind, **header}, {"numbers": np.zeros(0, np.int64)})


def work() -> Work:
    return Work(
        task=Task(key="t", family="t", messages=(), judge="j"), group=0, sample=0, seed=0, source="s",
        allowed=Round(number=0), response=Response(), media={},
    )  # fmt: skip


def test_a_shard_may_take_long_until_it_is_built(monkeypatch: pytest.MonkeyPatch) -> None:
    async def use(rollouts: ShardedRollouts, wire: Wire, starts: Starts, counts: Counter[str]) -> None:
        wire.said.put_nowait(said("hello"))
        wire.said.put_nowait(said("alive", figures={}))
        await asyncio.sleep(4 * SILENT_S)
        assert starts.names == ["shard 0.0"]
        wire.said.put_nowait(said("built"))
        while len(starts.names) < 2:
            await asyncio.sleep(SILENT_S / 10)
        assert starts.names == ["shard 0.0", "shard 0.1"] and counts == {"shard_deaths": 1}

    run(use, monkeypatch)


def test_what_shards_count_is_counted_once(monkeypatch: pytest.MonkeyPatch) -> None:
    async def use(rollouts: ShardedRollouts, wire: Wire, starts: Starts, counts: Counter[str]) -> None:
        for number in (1, 1, 3):
            wire.said.put_nowait(said("alive", figures={"counts": {"retried/timeout": number}}))
        while not wire.said.empty():
            await asyncio.sleep(0)
        assert counts == {"retried/timeout": 3}

    run(use, monkeypatch)


def test_what_ends_the_receiving_ends_the_run(monkeypatch: pytest.MonkeyPatch) -> None:
    async def use(rollouts: ShardedRollouts, wire: Wire, starts: Starts, counts: Counter[str]) -> None:
        waiting = asyncio.ensure_future(rollouts.respond(work(), lambda record: None))
        await asyncio.sleep(0)
        wire.said.put_nowait((b"shard 0.0", Record({"no": "kind"})))
        with pytest.raises(RolloutError, match="shards are given up: KeyError"):
            await waiting
        with pytest.raises(RolloutError, match="shards are given up"):
            await rollouts.respond(work(), lambda record: None)

    run(use, monkeypatch)


def test_a_queue_that_is_full_is_waited_for_and_holds_up_nobody_else(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(link_module, "QUEUED", 4)
    number, size = 64, 1 << 16

    async def inside() -> None:
        link = FirstRankLink(local_address(tmp_path))
        peers = {}
        for name in (b"slow", b"quick"):
            peers[name] = zmq.asyncio.Context.instance().socket(zmq.DEALER)
            peers[name].set_hwm(4)
            peers[name].setsockopt(zmq.LINGER, 0)
            peers[name].setsockopt(zmq.IDENTITY, name)
            peers[name].connect(link.address)
            await peers[name].send(Record({"kind": "hello"}).to_bytes())
            await link.receive()

        async def send() -> None:
            for place in range(number):
                await link.send(b"slow", Record({"kind": "x", "place": place, "rest": "r" * size}))

        sending = asyncio.ensure_future(send())
        await asyncio.sleep(0.3)
        assert not sending.done()
        await link.send(b"quick", Record({"kind": "x"}))
        assert await peers[b"quick"].recv()
        places = [message_in(await peers[b"slow"].recv()).header["place"] for _ in range(number)]
        assert places == list(range(number))
        await sending
        for peer in peers.values():
            peer.close()
        link.close()

    async def limited() -> None:
        async with asyncio.timeout(30):
            await inside()

    asyncio.run(limited())
