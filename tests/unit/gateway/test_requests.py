"""What the gateway makes of requests that are repeated, rewritten, wrong, too long, or given up."""

import asyncio
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

import aiohttp
import pytest

from k25_train.rollout.gateway import repeats, server
from tests.helpers.gateway_parts import END, Stage, Trial, call_text, gateway_stage

PATHS = {
    "chat": ("/v1/chat/completions", lambda messages: {"messages": messages}),
    "responses": ("/v1/responses", lambda messages: {"input": messages}),
    "messages": ("/v1/messages", lambda messages: {"messages": messages, "max_tokens": 50_000}),
}
HELLO = [{"role": "user", "content": "Hello"}]
Test = Callable[[Stage, aiohttp.ClientSession], Awaitable[None]]


def run(folder: Path, test: Test, says: Any = lambda prompt: f"Hi{END}", **settings: Any) -> None:
    async def staged() -> None:
        async with gateway_stage(folder, says, **settings) as stage, aiohttp.ClientSession() as http:
            async with asyncio.timeout(60):
                await test(stage, http)

    asyncio.run(staged())


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("vocabulary")


async def post(
    http: aiohttp.ClientSession, url: str, body: Any, **headers: str
) -> tuple[int, dict[str, Any], Any]:
    named = {name.replace("_", "-"): value for name, value in headers.items()}
    async with http.post(url, json=body, headers=named) as response:
        return response.status, await response.json(), response.headers


async def chat(http: aiohttp.ClientSession, trial: Trial, messages: Any, **headers: str) -> dict[str, Any]:
    status, body, _ = await post(http, f"{trial.url}/v1/chat/completions", {"messages": messages}, **headers)
    assert status == 200, body
    return body


def told(dialect: str, body: dict[str, Any]) -> str:
    assert ("type" in body) == (dialect == "messages")
    return str(body["error"]["message"])


@pytest.mark.parametrize("dialect", PATHS)
def test_errors_have_each_dialects_form(folder: Path, dialect: str) -> None:
    path, make = PATHS[dialect]
    long = [{"role": "user", "content": "long " * 400}]
    url = "https://a.b/c.png"
    image = {"chat": {"type": "image_url", "image_url": {"url": url}},
             "responses": {"type": "input_image", "image_url": url},
             "messages": {"type": "image", "source": {"type": "url", "url": url}}}  # fmt: skip
    stop = {"chat": "stop", "responses": "max_tool_calls", "messages": "stop_sequences"}[dialect]
    cases = [
        (make(long), 400, "max_prompt_tokens"),
        (make([]), 400, "empty"),
        (make("x" if dialect != "responses" else 3), 400, "must be"),
        (make([{"role": "nobody", "content": "x"}]), 400, "nobody"),
        (make([{"role": "user", "content": [image[dialect]]}]), 400, "data:"),
        (make([*HELLO, {"role": "assistant", "content": "So"}]), 400, "ends with the assistant"),
        ({**make(HELLO), stop: ["x"]}, 400, f"{stop}="),
        ({**make(HELLO), "tool_choice": {"type": "any"}}, 400, "tool_choice"),
    ]

    async def test(stage: Stage, http: aiohttp.ClientSession) -> None:
        trial = stage.open()
        for body, status, text in cases:
            got, error, headers = await post(http, trial.url + path, body)
            assert (got, headers["x-should-retry"]) == (status, "false")
            assert text in told(dialect, error), error
        overflow = (await post(http, trial.url + path, make(long)))[1]["error"]
        assert (
            overflow.get("code") == "context_length_exceeded" or "prompt is too long" in overflow["message"]
        )
        async with http.post(trial.url + path, data=b"{") as response:
            assert response.status == 400
            assert "JSON" in told(dialect, await response.json())
        async with http.post(trial.url + path, json=[]) as response:
            assert "no object" in told(dialect, await response.json())
        # Who is not known, and who knows another's key.
        other = stage.open()
        status, error, _ = await post(http, stage.url + path, make(HELLO), authorization="Bearer sk-k25-no")
        assert (status, "no session" in told(dialect, error)) == (401, True)
        assert (await post(http, f"{stage.url}/sessions/{'0' * 32}{path}", make(HELLO)))[0] == 404
        key = {"x_api_key": other.access.key}
        assert (await post(http, trial.url + path, make(HELLO), **key))[0] == 401
        assert (await post(http, stage.url + path, make(HELLO), **key))[0] == 200
        await stage.registry.close(other.access)
        assert (await post(http, stage.url + path, make(HELLO), **key))[0] == 401
        assert (await post(http, other.url + path, make(HELLO)))[0] == 404
        # No engine: not the client's fault, and the rollout's end.
        stage.engine.fails = True
        status, error, headers = await post(http, trial.url + path, make(HELLO))
        assert (status, headers["x-should-retry"]) == (503, "true")
        assert "status 500" in str(trial.session.fault)
        assert len(trial.response.branches) == 0

    run(folder, test, max_prompt_tokens=300)


def test_what_the_run_decides_about_is_ignored_by_name(folder: Path) -> None:
    async def test(stage: Stage, http: aiohttp.ClientSession) -> None:
        trial = stage.open()
        body = {"messages": HELLO, "temperature": 0.0, "top_p": 0.5, "max_tokens": 1, "n": 1}
        status, answer, headers = await post(http, f"{trial.url}/v1/chat/completions", body)
        assert (status, headers["x-k25-ignored"]) == (200, "temperature, top_p")
        assert answer["choices"][0]["finish_reason"] == "length"
        assert answer["usage"]["completion_tokens"] == 1
        # The turn was cut: its message is ended in front of what follows, and nothing is encoded again.
        said = answer["choices"][0]["message"]
        await chat(http, trial, [*HELLO, said, {"role": "user", "content": "More"}])
        assert len(trial.response.branches) == 1
        branch = trial.response.branches[0]
        first = answer["usage"]["prompt_tokens"]
        assert branch.token_ids[first + 1] == stage.prompts.stop_ids[0]
        assert not branch.own[first + 1]
        assert stage.mismatches([trial]) == []

    run(folder, test)


def test_token_ids_are_told_where_they_are_asked_for(folder: Path) -> None:
    async def test(stage: Stage, http: aiohttp.ClientSession) -> None:
        trial = stage.open()
        body = {"messages": HELLO, "return_token_ids": True, "logprobs": True}
        _, answer, _ = await post(http, f"{trial.url}/v1/chat/completions", body)
        choice, branch = answer["choices"][0], trial.response.branches[0]
        assert answer["prompt_token_ids"] + choice["token_ids"] == branch.token_ids.tolist()
        assert choice["message"]["generation_token_ids"] == choice["token_ids"]
        logprobs = [each["logprob"] for each in choice["logprobs"]["content"]]
        assert logprobs == choice["message"]["generation_log_probs"] == branch.logprobs[branch.own].tolist()

    run(folder, test)


def test_a_rewritten_history_forks_or_is_refused(folder: Path) -> None:
    says = iter(call_text("look", "{}", number) for number in range(100))

    async def test(stage: Stage, http: aiohttp.ClientSession) -> None:
        for strict in (False, True):
            trial = stage.open(strict=strict)
            first = (await chat(http, trial, HELLO))["choices"][0]["message"]
            call_id = first["tool_calls"][0]["id"]
            # As clients bring it back: another id, blanks in arguments, no content.
            call = {"id": "mine", "type": "function", "function": {"name": "look", "arguments": "{ }"}}
            again = {"role": "assistant", "content": None, "tool_calls": [call]}
            messages = [*HELLO, again, {"role": "tool", "tool_call_id": "mine", "content": "A"}]
            second = (await chat(http, trial, messages))["choices"][0]["message"]
            assert len(trial.response.branches) == 1
            assert (
                f"functions.look:{5 if strict else 0}"
                in stage.prompts.decode(trial.response.branches[0].token_ids).split("Return of ")[1]
            )
            rewritten = [*HELLO, first, {"role": "tool", "tool_call_id": call_id, "content": "B"}]
            invented = [*messages, {**second, "content": "No"}, {"role": "user", "content": "So?"}]
            other = [{"role": "system", "content": "Short."}, *HELLO]
            for history in (rewritten, invented, other):
                url = f"{trial.url}/v1/chat/completions"
                status, body, _ = await post(http, url, {"messages": history})
                assert status == (400 if strict else 200), body
            assert len(trial.response.branches) == (1 if strict else 4)
        # The ones that were drawn are trained once each.
        shared = [each.num_shared for each in trial.response.branches]
        assert shared == [0]

    run(folder, test, lambda prompt: next(says))


def test_retries_are_answered_once_and_first_tries_anew(folder: Path) -> None:
    async def test(stage: Stage, http: aiohttp.ClientSession) -> None:
        trial = stage.open()
        ids = [(await chat(http, trial, HELLO, x_stainless_retry_count=count))["id"] for count in "0120"] + [
            (await chat(http, trial, HELLO))["id"]
        ]
        # The second first try is a turn of its own, which what comes later repeats.
        assert [ids.index(each) for each in ids] == [0, 0, 0, 3, 3]
        assert len(stage.engine.exchanges) == len(trial.response.branches) == 2
        both = await asyncio.gather(*(chat(http, trial, [*HELLO, *HELLO]) for _ in range(4)))
        assert len({each["id"] for each in both}) == 1
        assert len(stage.engine.exchanges) == 3

    run(folder, test, pause_s=0.05)


def test_who_hangs_up_may_try_again_and_nobody_else_is_generated_for(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(repeats, "RETRY_S", 0.3)

    async def test(stage: Stage, http: aiohttp.ClientSession) -> None:
        trial = stage.open()
        stage.engine.pause_s = 0.2
        for count in ("0", "0"):
            with pytest.raises(TimeoutError):
                async with asyncio.timeout(0.08):
                    await chat(http, trial, HELLO, x_stainless_retry_count=count)
        assert (await chat(http, trial, HELLO, x_stainless_retry_count="0"))["object"] == "chat.completion"
        assert (len(stage.engine.exchanges), stage.engine.num_cancelled) == (1, 0)
        stage.engine.pause_s = 30
        with pytest.raises(TimeoutError):
            async with asyncio.timeout(0.1):
                await chat(http, trial, [*HELLO, *HELLO])
        while not stage.engine.num_cancelled:
            await asyncio.sleep(0.02)
        assert len(trial.response.branches) == 1

    run(folder, test)


def test_streams_have_keep_alives_and_errors_in_them(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(server, "KEEP_ALIVE_S", 0.05)

    async def test(stage: Stage, http: aiohttp.ClientSession) -> None:
        stage.engine.pause_s = 0.2
        for fails in (False, True):
            for dialect, (path, make) in PATHS.items():
                trial = stage.open()
                stage.engine.fails = fails
                body = {**make(HELLO), "stream": True, "stream_options": {"include_usage": True}}
                async with http.post(trial.url + path, json=body) as response:
                    text = await response.text()
                assert response.status == 200
                assert ("event: ping" if dialect == "messages" else ": keep-alive") in text
                assert ("no engine gives an answer" in text) == fails
                last = {"chat": "[DONE]", "responses": "response.completed", "messages": "message_stop"}
                assert (last[dialect] in text) != fails

    run(folder, test)


def test_turns_are_limited(folder: Path) -> None:
    async def test(stage: Stage, http: aiohttp.ClientSession) -> None:
        trial = stage.open(max_turns=2)
        for number in range(3):
            url = f"{trial.url}/v1/chat/completions"
            body = {"messages": [{"role": "user", "content": str(number)}]}
            status, error, _ = await post(http, url, body)
            assert status == (200 if number < 2 else 400)
        assert "max_turns" in error["error"]["message"]
        assert trial.session.has_no_turns_left

    run(folder, test)


def test_bodies_are_limited_and_paths_known(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(server, "LARGEST_BODY", 1000)

    async def test(stage: Stage, http: aiohttp.ClientSession) -> None:
        trial = stage.open()
        body = {"messages": [{"role": "user", "content": "x" * 2000}]}
        status, error, _ = await post(http, f"{trial.url}/v1/chat/completions", body)
        assert (status, "1,000 bytes" in error["error"]["message"]) == (413, True)
        status, error, _ = await post(http, f"{trial.url}/v1/completions", {})
        assert (status, "/v1/messages" in error["error"]["message"]) == (404, True)
        async with http.get(f"{trial.url}/v1/models") as response:
            assert (await response.json())["data"][0]["id"] == "policy"

    run(folder, test)


def test_keys_are_not_shown(folder: Path) -> None:
    async def test(stage: Stage, http: aiohttp.ClientSession) -> None:
        trials = [stage.open() for _ in range(50)]
        assert (
            len({trial.access.key for trial in trials} | {each.access.session_id for each in trials}) == 100
        )
        assert all(len(trial.access.key) > 40 for trial in trials)
        assert trials[0].access.key not in f"{trials[0].access} {trials[0].access!r}"
        assert trials[0].access.session_id not in repr(trials[0].access)

    run(folder, test)
