"""Engines that fail or lie: each time an error names the engine, the request, the answer and a remedy."""

from __future__ import annotations

import asyncio
import copy
from collections.abc import Awaitable, Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import save_file

from k25_train.rollout.engines.base import (
    EngineError,
    EngineLostError,
    PauseMode,
    ProbeSequence,
    Request,
    Sampling,
)
from k25_train.rollout.engines.http_engine import HttpEngine
from k25_train.rollout.engines.seeds import seed_at
from k25_train.rollout.engines.vllm.client import connect_vllm
from k25_train.rollout.engines.vllm.wire import generate_body
from tests.helpers.bad_engine import BadEngine
from tests.helpers.engine_subjects import LIMITS, over_vllm_wire, picture, serving
from tests.helpers.table_engine import MEDIA_PAD, TableEngine, served_model, table_tensors
from tests.helpers.tiny_shards import tiny_vision_config

QUICK = replace(LIMITS, request_s=0.3, update_s=0.3)
REQUEST = Request(
    key="sums/17#3",
    prompt_ids=(1, 2, 3),
    sampling=Sampling(max_tokens=4, temperature=1.0, seed=0, stop_ids=(9,), forbidden_ids=(MEDIA_PAD,)),
)


def run(server: BadEngine, body: Callable[[HttpEngine], Awaitable[None]], limits: Any = LIMITS) -> None:
    """Connect to the server and run a test with it."""

    async def connected() -> None:
        async with serving(server.app()) as url, asyncio.timeout(60):
            engine = await connect_vllm(url, served_model(tiny_vision_config()), limits)
            try:
                await body(engine)
            finally:
                await engine.close()

    asyncio.run(connected())


def refused(server: BadEngine, words: str, kind: str, limits: Any = LIMITS) -> None:
    """A response is asked for, and the error says what was wrong; it is counted by kind."""

    async def body(engine: HttpEngine) -> None:
        with pytest.raises(EngineError) as caught:
            await engine.generate(REQUEST)
        text = str(caught.value)
        assert words in text, text
        assert text.startswith("vLLM at http://127.0.0.1:") and "sums/17#3" in text and "\n  -> " in text
        assert engine.faults == {kind: 1}

    run(server, body, limits)


def test_a_right_answer_is_taken() -> None:
    async def body(engine: HttpEngine) -> None:
        assert (await engine.generate(REQUEST)).token_ids.tolist() == [7] * 4
        assert engine.faults == {}

    run(BadEngine(), body)


@pytest.mark.parametrize("status", [500, 503])
def test_a_status_that_may_pass_is_tried_again_a_few_times(status: int) -> None:
    server = BadEngine()
    server.statuses = [status, status]

    async def passes(engine: HttpEngine) -> None:
        await engine.generate(REQUEST)
        assert server.num_requests == LIMITS.attempts

    run(server, passes)
    server = BadEngine()
    server.statuses = [status] * 100
    refused(server, f'status {status} (3 tries): {{"error": "out of memory"}}', "status")
    assert server.num_requests == LIMITS.attempts


def test_a_status_that_does_not_pass_is_not_tried_again() -> None:
    server = BadEngine()
    server.statuses = [403] * 100
    refused(server, "status 403 (1 try)", "status")
    assert server.num_requests == 1


def test_an_engine_that_hangs_is_late() -> None:
    server = BadEngine()
    server.hangs = {"/inference/v1/generate"}
    refused(server, "no answer within 0.3 s", "timeout", QUICK)


def test_a_connection_that_closes_in_mid_answer_is_tried_again_a_few_times() -> None:
    server = BadEngine()
    server.breaks_off = True
    refused(server, "(3 tries)", "unreachable")
    assert server.num_requests == LIMITS.attempts


def changed(path: list[Any], value: Any) -> Callable[[dict[str, Any]], Any]:
    """A right answer with one value changed."""

    def twist(answer: dict[str, Any]) -> dict[str, Any]:
        answer = copy.deepcopy(answer)
        place: Any = answer
        for key in path[:-1]:
            place = place[key]
        place[path[-1]] = value
        return answer

    return twist


CHOICE = ["choices", 0]
CONTENT = [*CHOICE, "logprobs", "content"]
SPANS = [*CHOICE, "weight_versions"]


def spans(*triples: tuple[str, int, int]) -> Callable[[dict[str, Any]], Any]:
    return changed(SPANS, [dict(zip(("version", "start", "end"), each, strict=True)) for each in triples])


LIES = {
    "truncated JSON": (lambda answer: b'{"choices": [{"token_ids": [7, 7', "no JSON", "malformed"),
    "HTML": (lambda answer: b"<html>Bad gateway</html>", "<html>Bad gateway</html>", "malformed"),
    "nothing": (lambda answer: b"", "not of vLLM's form", "malformed"),
    "another form": (lambda answer: {"text": "7 7 7 7"}, "KeyError: 'choices'", "malformed"),
    "two choices": (lambda answer: {**answer, "choices": answer["choices"] * 2}, "too many", "malformed"),
    "a label that is no step": (spans(("default", 0, 4)), "'default'", "malformed"),
    "an unknown end": (changed([*CHOICE, "finish_reason"], "error"), "KeyError: 'error'", "malformed"),
    "too few log-probabilities": (changed(CONTENT, []), "0 log-probabilities for 4 tokens", "logprobs"),
    "log-probabilities of others": (changed([*CONTENT, 0, "token_id"], 8), "of other tokens", "malformed"),
    "NaN": (changed([*CONTENT, 1, "logprob"], float("nan")), "log-probability nan", "logprobs"),
    "infinity": (changed([*CONTENT, 1, "logprob"], float("-inf")), "log-probability -inf", "logprobs"),
    "vLLM's word for NaN": (changed([*CONTENT, 1, "logprob"], -9999.0), "-9999.0", "logprobs"),
    "null": (changed([*CONTENT, 1, "logprob"], None), "log-probability None", "logprobs"),
    "a probability above 1": (changed([*CONTENT, 1, "logprob"], 0.5), "log-probability 0.5", "logprobs"),
    "an id outside": (changed([*CHOICE, "token_ids"], [7, 7, 7, 64]), "token 3 is 64", "tokens"),
    "a negative id": (changed([*CHOICE, "token_ids"], [-1, 7, 7, 7]), "token 0 is -1", "tokens"),
    "a forbidden id": (changed([*CHOICE, "token_ids"], [7, 63, 7, 7]), "63, which is forbidden", "tokens"),
    "another prompt": (changed(["prompt_token_ids"], [1, 5, 3]), "the first other one at 1", "prompt"),
    "a longer prompt": (changed(["prompt_token_ids"], [0, 1, 2, 3]), "4 ids where 3 were asked", "prompt"),
    "no prompt": (changed(["prompt_token_ids"], None), "not of vLLM's form", "malformed"),
    "no spans": (spans(), "spans of versions: none", "versions"),
    "spans too short": (spans(("0", 0, 3)), "version 0 at 0 to 3", "versions"),
    "spans too long": (spans(("0", 0, 5)), "version 0 at 0 to 5", "versions"),
    "spans with a gap": (spans(("0", 0, 1), ("0", 2, 4)), "version 0 at 2 to 4", "versions"),
    "a version to come": (spans(("3", 0, 4)), "versions 0 to 0", "versions"),
    "stopped at no end": (changed([*CHOICE, "finish_reason"], "stop"), "stop after 4", "end"),
}


@pytest.mark.parametrize("lie", LIES, ids=str)
def test_an_answer_that_cannot_be_right_is_no_answer(lie: str) -> None:
    server = BadEngine()
    server.twist, words, kind = LIES[lie]
    # Ids of log-probabilities follow the tokens, so that the lie is the only one.
    twist = server.twist

    def consistent(answer: dict[str, Any]) -> Any:
        found = twist(answer)
        if kind == "tokens":
            for of, token in zip(
                found["choices"][0]["logprobs"]["content"], found["choices"][0]["token_ids"], strict=True
            ):
                of["token_id"] = token
        return found

    server.twist = consistent
    refused(server, words, kind)


@pytest.mark.parametrize(
    ("tokens", "reason", "words"),
    [
        ([7, 7], "length", "length after 2 of at most 4 tokens"),
        ([7, 9, 7, 7], "length", "an end at 1"),
        ([7, 9, 7, 9], "stop", "an end at 1"),
        ([7] * 5, "length", "length after 5 of at most 4 tokens"),
    ],
)
def test_an_end_has_to_be_borne_out_by_the_tokens(tokens: list[int], reason: str, words: str) -> None:
    def twist(answer: dict[str, Any]) -> dict[str, Any]:
        choice = answer["choices"][0]
        content = [{"token_id": token, "logprob": -1.0} for token in tokens]
        choice |= {"token_ids": tokens, "finish_reason": reason, "logprobs": {"content": content}}
        choice["weight_versions"][0]["end"] = len(tokens)
        return answer

    server = BadEngine()
    server.twist = twist
    refused(server, words, "end")


def test_a_server_that_is_not_there_is_named_with_what_starts_it() -> None:
    async def body() -> None:
        with pytest.raises(EngineError, match=r"127.0.0.1:9: .*3 tries.*\n.*k25_train.rollout serve"):
            await connect_vllm("http://127.0.0.1:9", served_model(tiny_vision_config()), LIMITS)

    asyncio.run(body())


def test_an_image_that_does_not_fit_its_prompt_is_the_requests_fault() -> None:
    async def body(engine: HttpEngine) -> None:
        with pytest.raises(EngineError, match=r"sums/17#3: has 0 placeholder\(s\) for 1 image"):
            await engine.generate(replace(REQUEST, images=(picture(9),)))
        with pytest.raises(EngineError, match="sums/17#3"):
            await engine.generate(replace(REQUEST, prompt_ids=(1, MEDIA_PAD), images=(b"no image",)))
        assert engine.faults == {"request": 2}

    run(BadEngine(), body)


def weights(folder: Path) -> Path:
    folder.mkdir()
    save_file(dict(table_tensors(1)), folder / "model-00001.safetensors")
    return folder


@pytest.mark.parametrize("route", ["/collective_rpc", "/reset_encoder_cache", "/update_weight_version"])
def test_a_commit_that_does_not_end_leaves_an_engine_that_refuses(route: str, tmp_path: Path) -> None:
    server = BadEngine()

    async def body(engine: HttpEngine) -> None:
        await engine.stage(weights(tmp_path / "new"), 1)
        server.hangs = {"/inference/v1/generate"}
        kept = asyncio.create_task(engine.generate(REQUEST))
        await asyncio.sleep(0.1)
        await engine.pause(PauseMode.keep)
        server.hangs |= {route}
        with pytest.raises(EngineError, match=r"no answer within 0\.3 s"):
            await engine.commit(1)
        with pytest.raises(EngineError, match="sums/17#3: commit of version 1 did not end well"):
            await kept
        server.hangs.clear()
        await engine.resume()
        with pytest.raises(EngineError, match="sums/17#3: commit of version 1 did not end well"):
            await engine.generate(REQUEST)

    run(server, body, QUICK)


@pytest.mark.parametrize("route", ["/resume", "/collective_rpc"])
def test_what_waits_for_the_end_of_a_pause_is_refused_once_the_engine_is_lost(
    route: str, tmp_path: Path
) -> None:
    server = BadEngine()

    async def body(engine: HttpEngine) -> None:
        await engine.stage(weights(tmp_path / "new"), 0)
        await engine.pause(PauseMode.keep)
        # More than may be on the way at once.
        waiting = [asyncio.create_task(engine.generate(REQUEST)) for _ in range(2 * LIMITS.max_running)]
        await asyncio.sleep(0.01)
        server.hangs = {route}
        with pytest.raises(EngineError, match=r"no answer within 0\.3 s"):
            await (engine.resume() if route == "/resume" else engine.commit(0))
        found = await asyncio.gather(*waiting, return_exceptions=True)
        assert all(isinstance(each, EngineLostError) for each in found) and server.num_requests == 0

        server.hangs.clear()
        await engine.pause(PauseMode.keep)
        await engine.commit(0) if route == "/collective_rpc" else None
        kept = asyncio.create_task(engine.generate(REQUEST))
        await asyncio.sleep(0.01)
        assert server.num_requests == 0, "it is paused still"
        kept.cancel()

    run(server, body, QUICK)


def test_a_server_that_is_gone_or_another_one_is_lost_and_one_that_fails_is_not() -> None:
    server = BadEngine()

    async def error_of(engine: HttpEngine) -> BaseException:
        with pytest.raises(EngineError) as caught:
            await engine.generate(REQUEST)
        return caught.value

    async def body(engine: HttpEngine) -> None:
        server.statuses = [500] * LIMITS.attempts
        assert not isinstance(await error_of(engine), EngineLostError)
        server.twist = spans(("7", 0, 4))
        assert isinstance(await error_of(engine), EngineLostError), "started again, with other weights"
        server.twist, server.breaks_off = (lambda answer: answer), True
        assert isinstance(await error_of(engine), EngineLostError)

    run(server, body)


def test_a_label_that_lags_is_found_by_the_commit(tmp_path: Path) -> None:
    server = BadEngine()

    async def body(engine: HttpEngine) -> None:
        await engine.stage(weights(tmp_path / "new"), 1)
        await engine.pause(PauseMode.keep)
        with pytest.raises(EngineError, match="says version 0 after version 1 was committed"):
            await engine.commit(1)
        assert engine.faults == {"weights": 1}

    run(server, body)


def test_tokens_with_the_label_of_earlier_weights_are_found_by_their_spans(tmp_path: Path) -> None:
    server = BadEngine()

    async def body(engine: HttpEngine) -> None:
        server.versions = ["1"]
        await engine.stage(weights(tmp_path / "new"), 1)
        await engine.pause(PauseMode.keep)
        await engine.commit(1)
        await engine.resume()
        with pytest.raises(EngineError, match="versions 1 to 1 were committed"):
            await engine.generate(REQUEST)

    run(server, body)


def test_old_weights_under_a_new_label_are_found_by_the_probe(tmp_path: Path) -> None:
    class Lazy(TableEngine):
        """Takes the label and leaves the weights."""

        async def commit(self, version: int) -> None:
            before = self._table
            await super().commit(version)
            self._table = before

    async def body() -> None:
        folder, sequence = weights(tmp_path / "new"), ProbeSequence((1, 2, 3, 4), ())
        found = {}
        for kind in (TableEngine, Lazy):
            model = served_model(tiny_vision_config())
            async with over_vllm_wire(kind(model), model) as engine:
                await engine.pause(PauseMode.keep)
                await engine.stage(folder, 1)
                await engine.commit(1)
                await engine.resume()
                assert (await engine.state()).version == 1
                (found[kind],) = await engine.probe([sequence])
        assert abs(found[TableEngine] - found[Lazy]).max() > 0.1

    asyncio.run(body())


def test_a_folder_without_weights_is_not_staged(tmp_path: Path) -> None:
    async def body(engine: HttpEngine) -> None:
        with pytest.raises(EngineError, match=r"has no \*.safetensors"):
            await engine.stage(tmp_path, 1)

    run(BadEngine(), body)


def test_a_pause_longer_than_the_limit_fails_no_response() -> None:
    async def body() -> None:
        model = served_model(tiny_vision_config())
        async with over_vllm_wire(TableEngine(model, step_s=0.01), model) as engine:
            assert isinstance(engine, HttpEngine)
            engine._limits = replace(LIMITS, request_s=1.0)
            task = asyncio.create_task(engine.generate(REQUEST))
            await asyncio.sleep(0.02)
            await engine.pause(PauseMode.keep)
            await asyncio.sleep(1.5)
            await engine.resume()
            assert len((await task).token_ids) > 0

    asyncio.run(body())


def test_another_part_of_a_response_is_drawn_by_another_seed() -> None:
    seeds = [seed_at(seed, position) for seed in range(20) for position in range(20)]
    assert len(set(seeds)) == 400
    assert all(0 <= seed < 2**63 for seed in seeds)
    later = replace(REQUEST, response_ids=(7,))
    first, second = (generate_body(each)["sampling_params"] for each in (REQUEST, later))
    assert first["seed"] != second["seed"] and (first["max_tokens"], second["max_tokens"]) == (4, 3)


def test_a_response_without_end_ends_when_its_caller_hangs_up() -> None:
    async def body() -> None:
        model = served_model(tiny_vision_config())
        table = TableEngine(model, step_s=0.001)
        async with over_vllm_wire(table, model) as engine, asyncio.timeout(60):
            endless = replace(REQUEST.sampling, max_tokens=10**6, stop_ids=())
            task = asyncio.create_task(engine.generate(replace(REQUEST, sampling=endless)))
            while not table.running:
                await asyncio.sleep(0.01)
            task.cancel()
            while table.running:
                await asyncio.sleep(0.01)

    asyncio.run(body())
