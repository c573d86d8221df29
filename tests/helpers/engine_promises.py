"""What every engine promises, as tests that take a `subject`: for modules of tests to import.

`tests/unit/rollout/test_engines.py` puts them to engines of ours, `tests/engine/test_conformance.py` to vLLM.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from pathlib import Path

import numpy as np
import pytest

from k25_train.rollout.engines.base import (
    Engine,
    EngineError,
    FinishReason,
    Generated,
    PauseMode,
    ProbeSequence,
    Request,
)
from k25_train.rollout.engines.in_process.folder import folder_tensors
from tests.helpers.engine_subjects import Subject, picture


def run(subject: Subject, body: Callable[[Engine], Awaitable[None]]) -> None:
    """Run a test against a connected engine."""

    async def connected() -> None:
        async with subject.open() as engine:
            async with asyncio.timeout(120):
                await body(engine)

    asyncio.run(connected())


async def probed(engine: Engine, request: Request, found: Generated) -> np.ndarray:
    """The probe's log-probabilities of the new tokens of a response."""
    ids = (*request.prompt_ids, *request.response_ids, *found.token_ids.tolist())
    (values,) = await engine.probe([ProbeSequence(ids, request.images)])
    return values[len(values) - len(found.token_ids) :]


def long_request(subject: Subject, **changes: object) -> Request:
    """One that takes a while, in which no placeholder comes: there would be no image for it."""
    forbidden = (subject.model.media_pad,)
    return subject.request(**{"max_tokens": subject.num_tokens, "forbidden_ids": forbidden, **changes})


async def in_its_middle(engine: Engine, subject: Subject) -> asyncio.Task[Generated]:
    """A long response that has begun."""
    task = asyncio.create_task(engine.generate(long_request(subject)))
    while (await engine.state()).running == 0:
        await asyncio.sleep(0.005)
    await asyncio.sleep(0.05)
    return task


async def push(engine: Engine, folder: Path) -> int:
    """Commit a folder's weights as the next version; it is paused."""
    version = (await engine.state()).version + 1
    await engine.stage(folder, version)
    await engine.commit(version)
    return version


def assert_covers(found: Generated) -> None:
    ends = [0, *(span.stop for span in found.spans)]
    assert [span.start for span in found.spans] == ends[:-1]
    assert ends[-1] == len(found.token_ids) == len(found.logprobs)


def test_tokens_in_and_tokens_out_with_the_log_probabilities_of_the_probe(subject: Subject) -> None:
    async def body(engine: Engine) -> None:
        request = subject.request()
        found = await engine.generate(request)
        assert found.prompt_ids.tolist() == list(subject.prompt)
        assert (len(found.token_ids), found.finish_reason) == (8, FinishReason.length)
        assert found.token_ids.dtype == np.int32 and found.logprobs.dtype == np.float32
        assert_covers(found)
        assert np.abs(found.logprobs - await probed(engine, request, found)).max() <= subject.tolerance

    run(subject, body)


def test_a_response_ends_at_one_of_the_given_ids_and_with_it(subject: Subject) -> None:
    async def body(engine: Engine) -> None:
        whole = (await engine.generate(subject.request(temperature=0.0))).token_ids.tolist()
        end = whole[-1]
        found = await engine.generate(subject.request(temperature=0.0, stop_ids=(end,)))
        assert found.finish_reason is FinishReason.stop
        assert found.token_ids.tolist() == whole[: whole.index(end) + 1]

    run(subject, body)


def test_temperature_and_forbidden_ids_change_draws_and_no_log_probability(subject: Subject) -> None:
    async def body(engine: Engine) -> None:
        allowed = [5, 6]
        forbidden = tuple(set(range(subject.model.vocab_size)) - set(allowed))
        request = subject.request(temperature=0.01, forbidden_ids=forbidden)
        found = await engine.generate(request)
        tokens = found.token_ids.tolist()
        assert set(tokens) <= set(allowed)
        assert np.abs(found.logprobs - await probed(engine, request, found)).max() <= subject.tolerance
        for index, token in enumerate(tokens):
            before = (*subject.prompt, *tokens[:index])
            one, other = await engine.probe([ProbeSequence((*before, each), ()) for each in allowed])
            # A hundredth of a nat is one nat at this temperature.
            if abs(one[-1] - other[-1]) > 0.2:
                assert token == allowed[int(other[-1] > one[-1])]

    run(subject, body)


def test_a_response_is_gone_on_with_behind_what_it_has(subject: Subject) -> None:
    async def body(engine: Engine) -> None:
        whole = await engine.generate(subject.request())
        begun = tuple(whole.token_ids[:3].tolist())
        request = subject.request(response_ids=begun)
        rest = await engine.generate(request)
        assert rest.prompt_ids.tolist() == list(subject.prompt)
        assert len(rest.token_ids) == 5
        assert_covers(rest)
        assert np.abs(rest.logprobs - await probed(engine, request, rest)).max() <= subject.tolerance
        if subject.same_draws:
            assert rest.token_ids.tolist() == whole.token_ids[3:].tolist()

    run(subject, body)


def test_an_image_comes_back_as_its_placeholders_and_is_looked_at(subject: Subject) -> None:
    async def body(engine: Engine) -> None:
        before, pad, after = subject.image_prompt
        request = subject.request(images=(picture(20),))
        found = await engine.generate(request)
        assert found.prompt_ids.tolist() == [before, *[pad] * 6, after]
        own = await probed(engine, request, found)
        assert np.abs(found.logprobs - own).max() <= subject.tolerance
        other = await probed(engine, subject.request(images=(picture(230),)), found)
        assert np.abs(own - other).max() > 100 * subject.tolerance

    run(subject, body)


def test_a_kept_response_goes_on_with_new_weights_and_none_of_the_old_keys(subject: Subject) -> None:
    async def body(engine: Engine) -> None:
        old = (await engine.state()).version
        task = await in_its_middle(engine, subject)
        await engine.pause(PauseMode.keep)
        await engine.pause(PauseMode.keep)
        new = await push(engine, subject.weights[1])
        await engine.probe([ProbeSequence(subject.prompt, ())])
        assert not task.done()
        await engine.resume()
        found = await task
        assert [span.version for span in found.spans] == [old, new]
        assert len(found.token_ids) == subject.num_tokens
        assert_covers(found)
        values = await probed(engine, subject.request(), found)
        differences = np.abs(found.logprobs - values)
        border = found.spans[0].stop
        assert differences[border:].max() <= subject.tolerance
        assert differences[:border].max() > 100 * subject.tolerance

        await engine.pause(PauseMode.keep)
        await push(engine, subject.weights[0])
        await engine.resume()
        values = await probed(engine, subject.request(), found)
        assert np.abs(found.logprobs - values)[:border].max() <= subject.tolerance

    run(subject, body)


def test_an_aborted_response_keeps_what_it_has_and_can_go_on(subject: Subject) -> None:
    async def body(engine: Engine) -> None:
        task = await in_its_middle(engine, subject)
        await engine.pause(PauseMode.abort)
        part = await task
        assert part.finish_reason is FinishReason.aborted
        assert 0 < len(part.token_ids) < subject.num_tokens
        assert_covers(part)
        begun = tuple(part.token_ids.tolist())
        rest = asyncio.create_task(
            engine.generate(long_request(subject, response_ids=begun, max_tokens=len(begun) + 4))
        )
        await asyncio.sleep(0.1)
        assert not rest.done(), "it is paused"
        await engine.resume()
        assert len((await rest).token_ids) == 4

    run(subject, body)


def test_more_requests_than_fit_are_all_answered_or_all_aborted(subject: Subject) -> None:
    async def body(engine: Engine) -> None:
        few = [engine.generate(subject.request(key=f"task/{i}", seed=i)) for i in range(12)]
        assert [len(found.token_ids) for found in await asyncio.gather(*few)] == [8] * 12
        long = [asyncio.create_task(engine.generate(long_request(subject, seed=i))) for i in range(12)]
        await asyncio.sleep(0.05)
        await engine.pause(PauseMode.abort)
        found = await asyncio.gather(*long)
        assert {each.finish_reason for each in found} == {FinishReason.aborted}
        await engine.resume()

    run(subject, body)


def test_who_hangs_up_is_not_generated_for(subject: Subject) -> None:
    async def body(engine: Engine) -> None:
        task = await in_its_middle(engine, subject)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        async with asyncio.timeout(10):
            while (await engine.state()).running:
                await asyncio.sleep(0.01)

    run(subject, body)


def test_weights_are_committed_to_a_paused_engine_that_has_them_staged(subject: Subject) -> None:
    async def body(engine: Engine) -> None:
        version = (await engine.state()).version
        with pytest.raises(EngineError, match="staged"):
            await engine.commit(version + 1)
        await engine.stage(subject.weights[0], version + 1)
        with pytest.raises(EngineError, match="pause"):
            await engine.commit(version + 1)
        await engine.pause(PauseMode.keep)
        with pytest.raises(EngineError, match="staged"):
            await engine.commit(version + 2)
        await engine.commit(version + 1)
        assert (await engine.state()).version == version + 1
        await engine.resume()

    run(subject, body)


def test_weights_are_staged_as_tensors_and_leave_nothing_behind(subject: Subject) -> None:
    def folders() -> set[str]:
        return {path.name for path in Path("/dev/shm").glob("k25-step-*")}

    async def body(engine: Engine) -> None:
        sequence, before = ProbeSequence(subject.prompt, ()), folders()
        found = []
        for folder in (subject.weights[1], subject.weights[0]):
            await engine.pause(PauseMode.keep)
            await push(engine, folder)
            found += await engine.probe([sequence])
            version = (await engine.state()).version + 1
            await engine.stage(folder_tensors(folder), version)
            await engine.commit(version)
            await engine.resume()
            found += await engine.probe([sequence])
        assert np.array_equal(found[0], found[1]) and np.array_equal(found[2], found[3])
        assert not np.array_equal(found[0], found[2])
        assert folders() <= before

    run(subject, body)
