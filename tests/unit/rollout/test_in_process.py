"""The engine in process: what it draws does not depend on how it gets there."""

import asyncio
from collections.abc import Coroutine, Iterator
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch

from k25_train.rollout.engines.base import (
    EngineError,
    FinishReason,
    Generated,
    PauseMode,
    ProbeSequence,
    Request,
    VersionSpan,
)
from k25_train.rollout.engines.in_process.engine import InProcessEngine
from k25_train.rollout.engines.in_process.responses import expand
from tests.helpers.hf_reference import build_hf_reference, hf_logits, random_checkpoint, tiny_model_config
from tests.helpers.sampled_engine import END, build_engine, forbidden_ids, picture, push, request, stream

MODEL = tiny_model_config()
WEIGHTS = (random_checkpoint(MODEL, 0), random_checkpoint(MODEL, 1))
TOLERANCE = 1e-5
PICTURES = (picture(56, 56, 1), picture(100, 40, 2))


@pytest.fixture(scope="module")
def engine() -> Iterator[InProcessEngine]:
    built = build_engine(MODEL, max_running=4)
    yield built
    asyncio.run(built.close())


def run[T](engine: InProcessEngine, body: Coroutine[Any, Any, T]) -> T:
    """With the first weights, and not paused."""

    async def whole() -> T:
        await push(engine, WEIGHTS[0], 0)
        return await asyncio.wait_for(body, 60)

    return asyncio.run(whole())


def requests(number: int, **sampling: Any) -> list[Request]:
    """Of unlike lengths, every third one with two images."""
    return [
        request(
            MODEL,
            each,
            length=5 + 7 * (each % 4),
            images=PICTURES if each % 3 == 1 else (),
            **({"max_tokens": 4 + 3 * (each % 3)} | sampling),
        )
        for each in range(number)
    ]


async def together(engine: InProcessEngine, wanted: list[Request]) -> list[Generated]:
    return await asyncio.gather(*(engine.generate(each) for each in wanted))


def whole(wanted: Request, got: Generated) -> ProbeSequence:
    """Prompt, earlier tokens and new ones, with one placeholder for each image."""
    return ProbeSequence((*wanted.prompt_ids, *wanted.response_ids, *got.token_ids.tolist()), wanted.images)


def assert_same(ones: list[Generated], others: list[Generated]) -> None:
    for one, other in zip(ones, others, strict=True):
        assert one.token_ids.tolist() == other.token_ids.tolist()
        assert one.prompt_ids.tolist() == other.prompt_ids.tolist()
        assert one.finish_reason is other.finish_reason
        np.testing.assert_allclose(one.logprobs, other.logprobs, rtol=0, atol=TOLERANCE)


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


def full_logprobs(reference: torch.nn.Module, sequence: ProbeSequence) -> np.ndarray:
    """[n - 1] of every token but the first."""
    expanded = expand(sequence, "test", MODEL.vision, MODEL.vocab_size - 2)
    ids = torch.tensor(expanded.ids)
    pixels = [image.patches / 127.5 - 1 for image in expanded.images]
    grids = [(1, image.grid.h, image.grid.w) for image in expanded.images]
    with torch.no_grad():
        logits = hf_logits(reference, ids, [len(ids)], torch.cat(pixels) if pixels else None, grids)
    return torch.log_softmax(logits, -1)[range(len(ids) - 1), ids[1:]].numpy()


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


def test_forbidden_ids_are_never_drawn(engine: InProcessEngine) -> None:
    async def body() -> None:
        allowed = (17, 40, 41)
        forbidden = tuple(each for each in range(MODEL.vocab_size) if each not in allowed)
        wanted = [request(MODEL, each, forbidden_ids=forbidden, max_tokens=10) for each in range(4)]
        wanted.append(request(MODEL, 9, max_tokens=10))
        got = await together(engine, wanted)
        assert {token for one in got[:4] for token in one.token_ids} == set(allowed)

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


def test_a_response_that_is_over_gets_no_more(engine: InProcessEngine) -> None:
    async def body() -> None:
        ended = await engine.generate(request(MODEL, 1, response_ids=(8, END)))
        assert (ended.finish_reason, len(ended.token_ids), ended.spans) == (FinishReason.stop, 0, ())
        full = await engine.generate(request(MODEL, 1, response_ids=(8, 8, 8), max_tokens=3))
        assert (full.finish_reason, len(full.token_ids)) == (FinishReason.length, 0)

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
        ends = await asyncio.wait_for(asyncio.gather(*forever, return_exceptions=True), 20)
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
            await asyncio.wait_for(waiting, 20)
        await engine.close()

    asyncio.run(body())


def test_forbidden_ids_of_the_model_are_those_of_media() -> None:
    assert forbidden_ids(MODEL) == (252, 253, 254)
