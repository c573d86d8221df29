"""Rollouts in processes: whatever dies, each response ends once, and as it would have."""

import asyncio
import os
import signal
import time
from collections import Counter
from collections.abc import Awaitable, Callable
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import psutil
import pytest

from k25_train.environments.base import Task
from k25_train.errors import RolloutError
from k25_train.rollout.engines.base import EngineError
from k25_train.rollout.engines.pool import EnginePool
from k25_train.rollout.records import Record
from k25_train.rollout.response_records import apply_record
from k25_train.rollout.shards import rollouts as module
from k25_train.rollout.shards.link import FirstRankLink, local_address
from k25_train.rollout.shards.processes import ProcessStarter
from k25_train.rollout.shards.rollouts import ShardedRollouts
from k25_train.rollout.trajectory import Response
from k25_train.rollout.work import Round, Work
from tests.helpers.scripted_engine import ScriptedEngine
from tests.helpers.shard_job import BUILD

TURNS = 5


class Shards:
    """Two shards, and what has come of their work."""

    def __init__(self, folder: Path, engine: ScriptedEngine, arguments: dict[str, Any]) -> None:
        folder.mkdir(exist_ok=True)
        self.pool = EnginePool.of([engine], 5.0)
        self.link = FirstRankLink(local_address(folder))
        self.starter = ProcessStarter(self.link.address)
        self.counts: Counter[str] = Counter()
        self.notices: list[str] = []
        begin = Record({"kind": "begin", "build": BUILD, "arguments": arguments})
        self.rollouts = ShardedRollouts(
            self.link, self.starter, 2, begin, self.pool,
            count=lambda kind: self.counts.update([kind]), notice=self.notices.append, stuck_s=2.0,
        )  # fmt: skip
        self.records: dict[int, list[str]] = {}

    async def respond(self, group: int, key: str = "t") -> Response:
        task = Task(key=key, family="t", messages=(), judge="j")
        work = Work(
            task=task, group=group, sample=0, seed=group * 100, source="s", allowed=Round(number=0),
            response=Response(), media={},
        )  # fmt: skip

        def append(record: Record) -> None:
            self.records.setdefault(group, []).append(record.header["kind"])
            apply_record(record, work.response, work.media)

        await self.rollouts.respond(work, append)
        return work.response


def run(
    folder: Path,
    use: Callable[[Shards], Awaitable[Any]],
    engine: ScriptedEngine | None = None,
    pause_s: float = 0.0,
    arguments: dict[str, Any] | None = None,
) -> Any:
    async def inside() -> Any:
        given = {"turns": TURNS, "pause_s": pause_s} if arguments is None else arguments
        shards = Shards(folder, engine or ScriptedEngine(), given)
        await shards.pool.update([], 0)
        await shards.rollouts.start()
        try:
            async with asyncio.timeout(90):
                return await use(shards)
        finally:
            await shards.rollouts.close()

    return asyncio.run(inside())


def told(responses: list[Response]) -> list[list[int]]:
    return [response.branches[0].token_ids.tolist() for response in responses]


def test_a_shard_that_is_killed_is_started_again_and_every_response_ends_once(tmp_path: Path) -> None:
    numbers = range(40)
    killed: list[int] = []

    async def undisturbed(shards: Shards) -> list[Response]:
        return list(await asyncio.gather(*(shards.respond(number) for number in numbers)))

    async def disturbed(shards: Shards) -> list[Response]:
        async def kill() -> None:
            while len(shards.records) < 20:
                await asyncio.sleep(0.01)
            for shard in range(2):
                killed.append(shards.starter.pid(shard))
                os.kill(killed[-1], signal.SIGKILL)

        responses, _ = await asyncio.gather(undisturbed(shards), kill())
        assert shards.counts["shard_deaths"] == 2
        dead = [notice for notice in shards.notices if "is dead (exit status -9)" in notice]
        assert len(dead) == 2 and all("t#0 of group" in notice for notice in dead)
        assert any("behind phase segment" in notice for notice in dead)
        assert all(kinds.count("ended") == kinds.count("judged") == 1 for kinds in shards.records.values())
        assert all(kinds.count("segment") == TURNS for kinds in shards.records.values())
        return responses

    expected = told(run(tmp_path / "a", undisturbed))
    assert told(run(tmp_path / "b", disturbed, pause_s=0.05)) == expected
    assert len(killed) == 2


def test_what_fails_in_a_shard_is_raised_by_its_kind(tmp_path: Path) -> None:
    async def use(shards: Shards) -> None:
        with pytest.raises(RolloutError, match="task broken: given up"):
            await shards.respond(0, "broken")
        with pytest.raises(EngineError, match="status 500"):
            await shards.respond(1)
        assert (await shards.respond(2)).is_finished

    run(tmp_path, use, ScriptedEngine(faults=["raise"]))


def test_work_that_kills_every_shard_ends_the_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "MOST_DEATHS", 1)

    async def use(shards: Shards) -> None:
        with pytest.raises(RolloutError, match="died 2 times in a row"):
            await shards.respond(0, "deadly")

    run(tmp_path, use)


def test_work_that_kills_its_shard_ends_the_run_though_other_work_ends(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "MOST_DEATHS", 1)

    async def use(shards: Shards) -> None:
        async def others() -> None:
            # Of the same shard, one after the other.
            for number in range(2, 2000, 2):
                await shards.respond(number)

        going = asyncio.create_task(others())
        with pytest.raises(RolloutError, match="each time it had deadly#0"):
            await shards.respond(0, "deadly")
        going.cancel()
        await asyncio.gather(going, return_exceptions=True)

    run(tmp_path, use)


def test_a_shard_that_cannot_be_built_ends_the_run_with_the_cause(tmp_path: Path) -> None:
    async def use(shards: Shards) -> None:
        with pytest.raises(RolloutError, match="cannot be built: KeyError: 'turns'"):
            await shards.respond(0)

    run(tmp_path, use, arguments={})


def test_work_that_no_shard_has_is_named_and_given_out_again(tmp_path: Path) -> None:
    async def use(shards: Shards) -> Response:
        send, dropped = shards.link.send, list[bytes]()

        async def lossy(peer: bytes, message: Record) -> None:
            if message.header["kind"] == "work" and not dropped:
                dropped.append(peer)
            else:
                await send(peer, message)

        shards.link.send = lossy  # type: ignore[method-assign]
        response = await shards.respond(3)
        assert dropped and shards.counts["lost"] == 1
        (notice,) = [each for each in shards.notices if "lost" in each]
        assert notice.startswith("t#0: lost: group 3 waits for it") and "behind phase given" in notice
        return response

    assert run(tmp_path, use).num_turns == TURNS


def first_rank(folder: Path) -> None:
    """A first rank that is killed once its shards have worked."""

    async def use(shards: Shards) -> None:
        await asyncio.gather(shards.respond(0), shards.respond(1))
        pids = [str(shards.starter.pid(shard)) for shard in range(2)]
        (folder / "pids").write_text(" ".join(pids))
        os.kill(os.getpid(), signal.SIGKILL)

    run(folder, use)


def test_shards_end_with_their_first_rank(tmp_path: Path) -> None:
    process = get_context("spawn").Process(target=first_rank, args=(tmp_path,))
    process.start()
    process.join()
    assert process.exitcode == -signal.SIGKILL
    left = [int(pid) for pid in (tmp_path / "pids").read_text().split()]
    for _ in range(1000):
        left = [pid for pid in left if psutil.pid_exists(pid) and psutil.Process(pid).status() != "zombie"]
        if not left:
            break
        time.sleep(0.02)
    assert not left
