"""The engine in process: what it is asked, what it refuses, and how it ends."""

import asyncio
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch

from k25_train.rollout.engines.base import (
    EngineError,
    FinishReason,
    PauseMode,
    ProbeSequence,
)
from k25_train.rollout.engines.in_process.engine import InProcessEngine
from tests.helpers.sampled_engine import END, build_engine, forbidden_ids, push, request, stream
from tests.helpers.sampled_responses import (
    MODEL,
    PICTURES,
    WEIGHTS,
    requests,
    run,
    together,
)


@pytest.fixture(scope="module")
def engine() -> Iterator[InProcessEngine]:
    built = build_engine(MODEL, max_running=4)
    yield built
    asyncio.run(built.close())


def test_forbidden_ids_are_never_drawn(engine: InProcessEngine) -> None:
    async def body() -> None:
        allowed = (17, 40, 41)
        forbidden = tuple(each for each in range(MODEL.vocab_size) if each not in allowed)
        wanted = [request(MODEL, each, forbidden_ids=forbidden, max_tokens=10) for each in range(4)]
        wanted.append(request(MODEL, 9, max_tokens=10))
        got = await together(engine, wanted)
        assert {token for one in got[:4] for token in one.token_ids} == set(allowed)

    run(engine, body())


def test_a_response_that_is_over_gets_no_more(engine: InProcessEngine) -> None:
    async def body() -> None:
        ended = await engine.generate(request(MODEL, 1, response_ids=(8, END)))
        assert (ended.finish_reason, len(ended.token_ids), ended.spans) == (FinishReason.stop, 0, ())
        full = await engine.generate(request(MODEL, 1, response_ids=(8, 8, 8), max_tokens=3))
        assert (full.finish_reason, len(full.token_ids)) == (FinishReason.length, 0)

    run(engine, body())


def test_cancelled_requests_free_their_slots(engine: InProcessEngine) -> None:
    async def body() -> None:
        running = [
            asyncio.create_task(engine.generate(each)) for each in requests(6, max_tokens=500, stop_ids=())
        ]
        while (await engine.state()).running < 4:
            await asyncio.sleep(0)
        for each in running:
            each.cancel()
        got = await together(engine, requests(3))
        assert len(got) == 3
        state = await engine.state()
        assert (state.running, state.waiting, state.version) == (0, 0, 0)

    run(engine, body())


def test_versions_are_committed_as_they_were_staged_and_in_a_pause(engine: InProcessEngine) -> None:
    async def body() -> None:
        await engine.stage(stream(WEIGHTS[1]), 7)
        with pytest.raises(EngineError, match=r"version 7 cannot be committed: the engine has to be paused"):
            await engine.commit(7)
        await engine.pause(PauseMode.keep)
        with pytest.raises(EngineError, match=r"version 8 cannot be committed: version 7 is staged"):
            await engine.commit(8)
        assert (await engine.state()).version == 0
        await engine.commit(7)
        with pytest.raises(EngineError, match="nothing is staged"):
            await engine.commit(7)
        assert (await engine.state()).version == 7
        await engine.resume()

    run(engine, body())


@pytest.mark.parametrize(
    ("changes", "match"),
    [
        ({"prompt_ids": (3, MODEL.vocab_size)}, "has the id 256, but the model knows 0 to 255"),
        ({"prompt_ids": ()}, "has an empty prompt"),
        ({"prompt_ids": (3, MODEL.vocab_size - 2)}, "has 1 placeholder.* for 0 image"),
        ({"images": (b"no image",)}, "is no image"),
        ({"images": (PICTURES[0][:300],), "prompt_ids": (MODEL.vocab_size - 2,)}, "does not decode"),
        ({"response_ids": (MODEL.vocab_size - 2,)}, "placeholder in its response"),
        ({"sampling": request(MODEL, 3, max_tokens=0).sampling}, "max_tokens=0"),
        ({"sampling": request(MODEL, 3, max_tokens=4000).sampling}, "positions end at 2048"),
        ({"sampling": request(MODEL, 3, forbidden_ids=tuple(range(256))).sampling}, "forbids every id"),
    ],
)
def test_requests_without_an_answer_are_named(
    engine: InProcessEngine, changes: dict[str, Any], match: str
) -> None:
    with pytest.raises(EngineError, match=f"in_process: task 3.*{match}"):
        run(engine, engine.generate(replace(request(MODEL, 3), **changes)))


def test_logprobs_that_are_not_finite_are_named(engine: InProcessEngine) -> None:
    async def body() -> None:
        broken = dict(WEIGHTS[0])
        broken["language_model.model.norm.weight"] = torch.full((MODEL.hidden_size,), torch.nan)
        await push(engine, broken, 3)
        with pytest.raises(
            EngineError, match=r"task 2: token 0 has a log-probability .* weights of version 3"
        ):
            await engine.generate(request(MODEL, 2))

    run(engine, body())


def test_probes_have_every_placeholder(engine: InProcessEngine) -> None:
    async def body() -> None:
        pad = MODEL.vocab_size - 2
        text, shown = await engine.probe(
            [ProbeSequence((3, 4, 5), ()), ProbeSequence((3, pad, 5), PICTURES[:1])]
        )
        assert (text.shape, shown.shape, text.dtype) == ((2,), (5,), np.float32)
        with pytest.raises(EngineError, match="probe 0: has 0 placeholder"):
            await engine.probe([ProbeSequence((3, 4), PICTURES[:1])])

    run(engine, body())


def test_without_weights_closed_or_broken_it_says_so() -> None:
    async def body() -> None:
        engine = build_engine(MODEL)
        with pytest.raises(EngineError, match="no weights yet"):
            await engine.generate(request(MODEL, 1))
        await push(engine, WEIGHTS[0], 0)
        forever = [asyncio.create_task(engine.generate(each)) for each in requests(6, max_tokens=900)]
        while (await engine.state()).running == 0:
            await asyncio.sleep(0)

        def fail(*_: object) -> None:
            raise MemoryError("no room")

        engine._network.tokens = fail  # type: ignore[method-assign]
        ends = await asyncio.wait_for(asyncio.gather(*forever, return_exceptions=True), 120)
        for end in ends:
            assert isinstance(end, EngineError) and "generating failed: MemoryError: no room" in str(end)
        for later in (engine.generate(request(MODEL, 1)), engine.state(), engine.pause(PauseMode.keep)):
            with pytest.raises(EngineError, match="MemoryError: no room"):
                await later
        await engine.close()

    asyncio.run(body())


def test_closing_ends_what_waits() -> None:
    async def body() -> None:
        engine = build_engine(MODEL)
        await push(engine, WEIGHTS[0], 0)
        await engine.pause(PauseMode.keep)
        waiting = asyncio.create_task(engine.generate(request(MODEL, 1)))
        await asyncio.sleep(0)
        await engine.close()
        with pytest.raises(EngineError, match="was closed"):
            await asyncio.wait_for(waiting, 120)
        await engine.close()

    asyncio.run(body())


def test_forbidden_ids_of_the_model_are_those_of_media() -> None:
    assert forbidden_ids(MODEL) == (252, 253, 254)
