"""Engines as one: all have new weights before one samples from them; those that miss an update are out."""

import asyncio
from collections.abc import Callable, Coroutine, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from k25_train.rollout.engines.base import (
    Engine,
    EngineError,
    EngineLostError,
    EngineState,
    FinishReason,
    Generated,
    PauseMode,
    ProbeSequence,
    Request,
    Sampling,
    VersionSpan,
)
from k25_train.rollout.engines.pool import EnginePool

WEIGHTS = Path("weights")
REQUEST = Request(
    key="task 1, response 0",
    prompt_ids=(1, 2),
    sampling=Sampling(max_tokens=3, temperature=1.0, seed=0, stop_ids=(), forbidden_ids=()),
)


class Told:
    """An engine that writes down what it is asked for, and fails where it is told to."""

    def __init__(self, name: str, log: list[str], fails: str = "", hangs: str = "") -> None:
        self.name = name
        self.log = log
        self.fails = fails
        self.hangs = hangs
        self.version = -1
        self.staged = -1
        self.seconds = 0.0
        self.error: type[EngineError] = EngineError

    async def _note(self, what: str) -> None:
        self.log.append(f"{self.name} {what}")
        await asyncio.sleep(60 if what == self.hangs else self.seconds)
        if what == self.fails:
            raise self.error(f"{self.name} answered 500")

    async def generate(self, request: Request) -> Generated:
        await self._note("generate")
        ids = np.array([7], dtype=np.int32)
        return Generated(
            prompt_ids=ids,
            token_ids=ids,
            logprobs=np.zeros(1, dtype=np.float32),
            spans=(VersionSpan(self.version, 0, 1),),
            finish_reason=FinishReason.stop,
        )

    async def pause(self, mode: PauseMode) -> None:
        await self._note("pause")

    async def resume(self) -> None:
        await self._note("resume")

    async def stage(self, tensors: object, version: int) -> None:
        await self._note("stage")
        self.staged = version

    async def commit(self, version: int) -> None:
        await self._note("commit")
        if self.staged != version:
            raise EngineError(f"{self.name} has staged {self.staged}")
        self.version = version

    async def adopt(self, version: int) -> None:
        await self._note("adopt")
        self.version = version

    async def probe(self, sequences: Sequence[ProbeSequence]) -> list[np.ndarray]:
        await self._note("probe")
        return [np.full(len(each.token_ids) - 1, self.version, dtype=np.float32) for each in sequences]

    async def state(self) -> EngineState:
        return EngineState(version=self.version, running=0, waiting=0, busy_share=0.0, kv_use=0.0)

    async def close(self) -> None:
        await self._note("close")


def run(
    body: Callable[[EnginePool, list[Told], list[str]], Coroutine[Any, Any, None]], **faults: dict[str, str]
) -> tuple[EnginePool, list[Told], list[str]]:
    """Three engines `a`, `b`, `c`, some of which fail or hang."""
    log: list[str] = []
    engines = [Told(name, log, **faults.get(name, {})) for name in "abc"]
    checked: list[Engine] = list(engines)
    pool = EnginePool.of(checked, timeout_s=0.2)
    asyncio.run(body(pool, engines, log))
    return pool, engines, log


async def update(pool: EnginePool, engines: list[Told], log: list[str]) -> None:
    await pool.update(WEIGHTS, 1)


def test_all_have_staged_before_one_commits_and_committed_before_one_resumes() -> None:
    pool, engines, log = run(update)
    phases = [line.split()[1] for line in log]
    assert phases == [phase for phase in ("stage", "pause", "commit", "resume") for _ in "abc"]
    assert pool.version == 1 and [engine.version for engine in engines] == [1, 1, 1]


@pytest.mark.parametrize("phase", ["stage", "pause", "commit", "resume"])
@pytest.mark.parametrize("fault", ["fails", "hangs"])
def test_who_misses_an_update_gets_no_request(phase: str, fault: str) -> None:
    async def body(pool: EnginePool, engines: list[Told], log: list[str]) -> None:
        await pool.update(WEIGHTS, 1)
        found = [await pool.generate(REQUEST) for _ in range(6)]
        assert {each.spans[0].version for each in found} == {1}

    pool, _, log = run(body, b={fault: phase})
    assert "b generate" not in log and log.count("a generate") + log.count("c generate") == 6
    (told,) = pool.take_events()
    cause = "answered 500" if fault == "fails" else "no answer within 0.2 s"
    assert told.startswith("b is fenced off") and phase in told and cause in told
    assert pool.take_events() == []


def test_who_comes_back_has_the_version_of_the_others() -> None:
    async def body(pool: EnginePool, engines: list[Told], log: list[str]) -> None:
        await pool.update(WEIGHTS, 1)
        engines[1].fails = ""
        await pool.rebuild()
        await pool.update(WEIGHTS, 2)

    pool, engines, _ = run(body, b={"fails": "commit"})
    assert [engine.version for engine in engines] == [2, 2, 2]
    assert len(pool.serving) == 3
    assert "b serves version 1 again" in pool.take_events()[1]


def test_who_fails_again_stays_out() -> None:
    async def body(pool: EnginePool, engines: list[Told], log: list[str]) -> None:
        await pool.update(WEIGHTS, 1)
        await pool.rebuild()

    pool, _, _ = run(body, b={"fails": "commit"})
    assert [member.engine.name for member in pool.serving] == ["a", "c"]


def test_without_any_engine_every_name_and_cause_is_told() -> None:
    faults = {name: {"fails": "stage"} for name in "abc"}
    with pytest.raises(EngineError) as caught:
        run(update, **faults)
    assert all(f"{name}: stage failed: {name} answered 500" in str(caught.value) for name in "abc")


def test_a_fenced_engine_gets_nothing_and_the_last_one_cannot_be() -> None:
    async def body(pool: EnginePool, engines: list[Told], log: list[str]) -> None:
        await pool.update(WEIGHTS, 1)
        pool.fence("a", "its probe is off")
        pool.fence("b", "its probe is off")
        assert set(await pool.probe([ProbeSequence((1, 2, 3), ())])) == {"c"}
        with pytest.raises(EngineError, match="no engine is left"):
            pool.fence("c", "its probe is off")

    run(body)


def test_the_one_with_the_least_to_do_is_asked() -> None:
    async def body(pool: EnginePool, engines: list[Told], log: list[str]) -> None:
        for engine in engines:
            engine.seconds = 0.01
        await asyncio.gather(*(pool.generate(REQUEST) for _ in range(9)))
        assert all(log.count(f"{name} generate") == 3 for name in "abc")

    run(body)


def test_turns_of_a_response_go_where_the_earlier_ones_are_cached() -> None:
    async def check(pool: EnginePool, engines: list[Told], log: list[str]) -> None:
        pool.members[0].running = pool.members[2].running = 1
        for name in ("task 1#a", "task 1#a, turn 1", "task 2#b"):
            await pool.generate(replace(REQUEST, key=name))
            pool.members[1].running += 2 * (name == "task 1#a")
        assert [each for each in log if "generate" in each] == ["b generate", "b generate", "a generate"]

    run(check)


def test_weights_that_come_by_another_way_come_while_all_are_paused() -> None:
    async def body(pool: EnginePool, engines: list[Told], log: list[str]) -> None:
        await pool.update_by(lambda: log.append("- sent"), 3)

    pool, engines, log = run(body)
    phases = [line.split()[1] for line in log]
    assert phases == [*["pause"] * 3, "sent", *["adopt"] * 3, *["resume"] * 3]
    assert pool.version == 3 and [engine.version for engine in engines] == [3, 3, 3]


def test_what_an_engine_generates_while_it_is_fenced_off_is_not_believed() -> None:
    async def body(pool: EnginePool, engines: list[Told], log: list[str]) -> None:
        await pool.update(WEIGHTS, 1)
        engines[0].seconds = 0.05
        asked = asyncio.create_task(pool.generate(REQUEST))
        await asyncio.sleep(0.01)
        # The probe finds other weights behind the right label.
        pool.fence("a", "other weights")
        with pytest.raises(EngineError, match="a: fenced off while it generated: other weights"):
            await asked

    run(body)


def test_a_dead_engine_has_the_least_to_do_and_is_asked_once() -> None:
    async def body(pool: EnginePool, engines: list[Told], log: list[str]) -> None:
        await pool.update(WEIGHTS, 1)
        engines[0].error, engines[0].fails = EngineLostError, "generate"
        with pytest.raises(EngineLostError):
            await pool.generate(REQUEST)
        for _ in range(5):
            await pool.generate(REQUEST)
        assert log.count("a generate") == 1
        assert pool.take_events() == ["a is fenced off: a answered 500"]
        engines[0].fails = ""
        await pool.rebuild()
        assert len(pool.serving) == 3

    run(body)


def test_the_last_engine_that_dies_ends_it_with_all_names() -> None:
    async def body(pool: EnginePool, engines: list[Told], log: list[str]) -> None:
        await pool.update(WEIGHTS, 1)
        for engine in engines:
            engine.error, engine.fails = EngineLostError, "generate"
        for _ in range(2):
            with pytest.raises(EngineLostError):
                await pool.generate(REQUEST)
        with pytest.raises(EngineError, match=r"no engine is left.*a: a ans.*b: b ans.*c: c ans"):
            await pool.generate(REQUEST)

    run(body)


def test_an_engine_that_failed_is_asked_after_those_that_did_not() -> None:
    async def body(pool: EnginePool, engines: list[Told], log: list[str]) -> None:
        await pool.update(WEIGHTS, 1)
        engines[0].fails = "generate"
        with pytest.raises(EngineError):
            await pool.generate(REQUEST)
        assert len(pool.serving) == 3, "an answer that is wrong once may be right the next time"
        for _ in range(5):
            await pool.generate(REQUEST)
        assert log.count("a generate") == 1
        engines[0].fails = ""
        await pool.update(WEIGHTS, 2)
        await pool.generate(REQUEST)
        assert log.count("a generate") == 2

    run(body)


@pytest.mark.parametrize("fails", ["", "generate"])
def test_what_was_asked_before_an_engine_was_rebuilt_says_nothing_of_it(fails: str) -> None:
    async def body(pool: EnginePool, engines: list[Told], log: list[str]) -> None:
        await pool.update(WEIGHTS, 1)
        engines[0].seconds, engines[0].error, engines[0].fails = 0.05, EngineLostError, fails
        asked = asyncio.create_task(pool.generate(REQUEST))
        await asyncio.sleep(0.01)
        engines[0].seconds = 0.0
        pool.fence("a", "other weights")
        await pool.rebuild()
        with pytest.raises(EngineError, match="answered 500" if fails else "it has been rebuilt since"):
            await asked
        assert len(pool.serving) == 3, "it is not the one that was asked"

    run(body)


def test_why_an_engine_is_out_does_not_grow_with_every_push() -> None:
    async def body(pool: EnginePool, engines: list[Told], log: list[str]) -> None:
        await pool.update(WEIGHTS, 1)
        for _ in range(9):
            await pool.rebuild()
        why = pool.members[1].why_fenced
        assert why == "commit failed: b answered 500; then b answered 500"

    run(body, b={"fails": "commit"})
