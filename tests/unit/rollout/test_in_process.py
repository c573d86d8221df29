"""The engine in process: what it draws does not depend on how it gets there."""

import asyncio
from collections.abc import Iterator
from dataclasses import replace

import numpy as np
import pytest

from k25_train.rollout.engines.base import (
    FinishReason,
    PauseMode,
    VersionSpan,
)
from k25_train.rollout.engines.in_process.engine import InProcessEngine
from tests.helpers.hf_reference import build_hf_reference
from tests.helpers.sampled_engine import END, build_engine, push, request
from tests.helpers.sampled_responses import (
    MODEL,
    PICTURES,
    TOLERANCE,
    WEIGHTS,
    assert_same,
    full_logprobs,
    requests,
    run,
    together,
    whole,
)


@pytest.fixture(scope="module")
def engine() -> Iterator[InProcessEngine]:
    built = build_engine(MODEL, max_running=4)
    yield built
    asyncio.run(built.close())


def test_alone_and_among_others_and_with_more_than_there_are_slots(engine: InProcessEngine) -> None:
    async def body() -> None:
        wanted = requests(7)
        crowd = await together(engine, wanted)
        assert_same(crowd, [await engine.generate(each) for each in wanted])
        assert_same(crowd, (await together(engine, wanted[::-1]))[::-1])
        for each, got in zip(wanted, crowd, strict=True):
            assert got.spans == (VersionSpan(0, 0, len(got.token_ids)),)
            assert got.logprobs.dtype == np.float32 and got.token_ids.dtype == np.int32
            ended = got.token_ids[-1] == END
            assert got.finish_reason is (FinishReason.stop if ended else FinishReason.length)
            assert ended or len(got.token_ids) == each.sampling.max_tokens
        assert len({tuple(got.token_ids) for got in crowd}) == len(crowd)

    run(engine, body())


def test_responses_to_one_prompt_share_its_keys_and_nothing_else(engine: InProcessEngine) -> None:
    async def body() -> None:
        group = [
            replace(each, sampling=replace(each.sampling, seed=seed))
            for each in (request(MODEL, 2), request(MODEL, 4, images=PICTURES))
            for seed in range(3)
        ]
        other_pictures = replace(group[3], images=PICTURES[::-1])
        crowd = await together(engine, [*group, other_pictures])
        assert_same(crowd, [await engine.generate(each) for each in [*group, other_pictures]])
        assert len({tuple(got.token_ids) for got in crowd[:3]}) == 3

    run(engine, body())


def test_logprobs_are_those_of_a_full_forward(engine: InProcessEngine) -> None:
    """At temperature 1 over all ids, however they were drawn; of transformers' model called as a whole."""
    reference, _ = build_hf_reference(MODEL, WEIGHTS[0])

    async def body() -> None:
        # The first one outgrows what a slot has room for at first.
        wanted = [
            request(MODEL, 20, length=61),
            *requests(4),
            *requests(3, forbidden_ids=(5, 9), temperature=0.6),
            *requests(2, temperature=0),
        ]
        for each, got in zip(wanted, await together(engine, wanted), strict=True):
            expected = full_logprobs(reference, whole(each, got))
            np.testing.assert_allclose(got.logprobs, expected[-len(got.token_ids) :], rtol=0, atol=TOLERANCE)
            (probed,) = await engine.probe([whole(each, got)])
            np.testing.assert_allclose(probed, expected, rtol=0, atol=TOLERANCE)

    run(engine, body())


def test_placeholders_come_back_expanded(engine: InProcessEngine) -> None:
    async def body() -> None:
        got = await engine.generate(request(MODEL, 1, images=PICTURES))
        pad = MODEL.vocab_size - 2
        # 56 x 56 are 4 x 4 patches; 100 x 40 are 8 x 4 after padding.
        assert (got.prompt_ids == pad).sum() == 4 + 8
        assert (got.prompt_ids[1:5] == pad).all() and (got.prompt_ids[6:14] == pad).all()
        swapped = await engine.generate(request(MODEL, 1, images=PICTURES[::-1]))
        assert (swapped.prompt_ids[1:9] == pad).all()
        assert abs(swapped.logprobs[0] - got.logprobs[0]) > 100 * TOLERANCE

    run(engine, body())


def test_a_pause_in_the_middle_changes_nothing(engine: InProcessEngine) -> None:
    async def body() -> None:
        wanted = requests(5, max_tokens=12, stop_ids=())
        expected = await together(engine, wanted)
        running = [asyncio.create_task(engine.generate(each)) for each in wanted]
        while (await engine.state()).running == 0:
            await asyncio.sleep(0)
        await engine.pause(PauseMode.keep)
        await engine.pause(PauseMode.keep)
        before = await engine.state()
        assert before.running + before.waiting > 0
        await asyncio.sleep(0.02)
        assert (await engine.state()).busy_share == 0
        await engine.resume()
        assert_same(expected, list(await asyncio.gather(*running)))

    run(engine, body())


def test_aborted_responses_go_on_where_they_were(engine: InProcessEngine) -> None:
    async def body() -> None:
        wanted = requests(5, max_tokens=16, stop_ids=())
        expected = await together(engine, wanted)
        running = [asyncio.create_task(engine.generate(each)) for each in wanted]
        while (await engine.state()).running < 4:
            await asyncio.sleep(0)
        await engine.pause(PauseMode.abort)
        first = await asyncio.gather(*running)
        assert any(0 < len(one.token_ids) < 16 for one in first)
        assert any(one.finish_reason is FinishReason.aborted for one in first)
        await engine.resume()
        again = [
            replace(each, response_ids=tuple(one.token_ids.tolist()))
            for each, one in zip(wanted, first, strict=True)
        ]
        rest = await together(engine, again)
        for one, before, after in zip(expected, first, rest, strict=True):
            assert one.token_ids.tolist() == [*before.token_ids, *after.token_ids]
            logprobs = np.concatenate([before.logprobs, after.logprobs])
            np.testing.assert_allclose(one.logprobs, logprobs, rtol=0, atol=TOLERANCE)

    run(engine, body())


def test_kept_responses_go_on_with_new_weights_and_no_old_keys(engine: InProcessEngine) -> None:
    async def body() -> None:
        wanted = requests(5, max_tokens=12, stop_ids=())
        running = [asyncio.create_task(engine.generate(each)) for each in wanted]
        while (await engine.state()).running < 4:
            await asyncio.sleep(0)
        live = {name: tensor.data_ptr() for name, tensor in engine._network.weights.items()}
        await push(engine, WEIGHTS[1], 5)
        assert {name: tensor.data_ptr() for name, tensor in engine._network.weights.items()} == live
        got = await asyncio.gather(*running)
        assert {span.version for one in got for span in one.spans} == {0, 5}
        # What is left of the old weights would be there in a second try as well: here is a model without.
        reference, _ = build_hf_reference(MODEL, WEIGHTS[1])
        start, stop = got[1].spans[-1][1:]
        expected = full_logprobs(reference, whole(wanted[1], got[1]))[-12:]
        np.testing.assert_allclose(got[1].logprobs[start:stop], expected[start:stop], rtol=0, atol=TOLERANCE)
        for each, one in zip(wanted, got, strict=True):
            assert [span.start for span in one.spans] == [0, *(span.stop for span in one.spans[:-1])]
            assert one.spans[-1].stop == 12
            for version, start, stop in one.spans:
                await push(engine, WEIGHTS[version > 0], version)
                already = tuple(one.token_ids[:start].tolist())
                again = replace(each, response_ids=already, sampling=replace(each.sampling, max_tokens=stop))
                alone = await engine.generate(again)
                assert alone.token_ids.tolist() == one.token_ids[start:stop].tolist()
                np.testing.assert_allclose(one.logprobs[start:stop], alone.logprobs, rtol=0, atol=TOLERANCE)

    run(engine, body())
