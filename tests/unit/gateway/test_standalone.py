"""The gateway without a run: an SDK over a socket, engines that come and go, traces that `show` reads."""

import asyncio
from pathlib import Path
from typing import Any

import aiohttp
import openai
import pytest

from k25_train.compose.resolve import compose
from k25_train.errors import ConfigError
from k25_train.rollout.__main__ import main
from k25_train.rollout.engines.served_model import ServedModel
from k25_train.rollout.engines.server import EngineServer
from k25_train.rollout.gateway.standalone import admin
from k25_train.rollout.gateway.standalone.gateway import GatewayOrder, Serving, standalone_gateway
from k25_train.rollout.gateway.standalone.health import reasons
from k25_train.rollout.journal import read_state
from tests.helpers.engine_subjects import serving
from tests.helpers.gateway_parts import load_tiny_tokenizer
from tests.helpers.scripted_engine import ScriptedEngine

HELLO: list[Any] = [{"role": "user", "content": "Hello"}]


def order_of(folder: Path, urls: list[str]) -> GatewayOrder:
    load_tiny_tokenizer(folder)
    path = folder / "config.yaml"
    path.write_text("saved: true\n")
    config = compose(
        [
            "experiment=rl_smoke",
            f"data.tokenizer={folder}/tokenizer.json",
            "rollout.max_prompt_tokens=190",
            "rollout.max_attempts=2",
        ]
    )
    return GatewayOrder(
        config_path=path,
        config=config,
        urls=urls,
        folder=folder / "to",
        host="127.0.0.1",
        port=0,
        health_s=0.1,
    )


def server(order: GatewayOrder, engine: ScriptedEngine) -> Any:
    tokenizer = load_tiny_tokenizer(order.config_path.parent)
    engine.version = 7
    model = ServedModel(
        vocab_size=order.config.model.vocab_size,
        media_pad=tokenizer.media_pad,
        vision=order.config.model.vision,
    )
    return serving(EngineServer(engine, model).app())


async def ask(http: aiohttp.ClientSession, way: str, url: str, key: str, body: Any = None) -> tuple[int, Any]:
    headers = {"authorization": f"Bearer {key}"}
    async with http.request(way, url, json=body, headers=headers) as response:
        return response.status, await response.json()


async def refusals(http: aiohttp.ClientSession, at: Serving, monkeypatch: pytest.MonkeyPatch) -> None:
    url = f"{at.url}/admin/sessions"
    for body in ({"name": 7}, {"max_turns": 0}, {"max_turns": True}, {"nam": "a"}, [1]):
        assert (await ask(http, "POST", url, at.admin_key, body))[0] == 400
    for way in ("POST", "GET"):
        assert (await ask(http, way, url, "sk-k25-admin-"))[0] == 401
    assert (await ask(http, "DELETE", f"{url}/0", ""))[0] == 401
    assert (await ask(http, "DELETE", f"{url}/9", at.admin_key))[0] == 404
    with monkeypatch.context() as patched:
        patched.setattr(admin, "MOST_OPEN", 0)
        assert (await ask(http, "POST", url, at.admin_key))[0] == 429


def test_an_sdk_over_a_socket_leaves_traces(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    told: list[str] = []

    async def test() -> None:
        engines = [ScriptedEngine(), ScriptedEngine()]
        order = order_of(tmp_path, [])
        async with server(order, engines[0]) as one, server(order, engines[1]) as two, asyncio.timeout(60):
            order = order_of(tmp_path, [one, two])
            async with standalone_gateway(order, told.append) as at, aiohttp.ClientSession() as http:
                # 1. A session, two turns, one branch.
                url = f"{at.url}/admin/sessions"
                status, opened = await ask(http, "POST", url, at.admin_key, {"name": "mine", "max_turns": 5})
                assert (status, opened["group"]) == (201, 0)
                async with openai.AsyncOpenAI(base_url=opened["base_url"], api_key=opened["key"]) as client:
                    done = await client.chat.completions.create(model="policy", messages=HELLO)
                    said: Any = done.choices[0].message.model_dump(exclude_none=True)
                    more = [*HELLO, said, {"role": "user", "content": "More"}]
                    await client.chat.completions.create(model="policy", messages=more)
                assert [len(each.asked) for each in engines] in ([2, 0], [0, 2]), (
                    "it stays where its cache is"
                )
                _, listed = await ask(http, "GET", url, at.admin_key)
                assert [each["name"] for each in listed["sessions"]] == ["mine"]
                assert opened["key"] not in str(listed)
                await refusals(http, at, monkeypatch)

                # 2. An engine whose weights are others' is fenced off, and taken back.
                engines[0].version = 8
                while not any("version 8" in text for text in told):
                    await asyncio.sleep(0.05)
                _, health = await ask(http, "GET", f"{at.url}/health", "")
                assert (health["version"], health["engines_serving"], len(health["engines_fenced"])) == (
                    7,
                    1,
                    1,
                )
                engines[0].version = 7
                while "serves again" not in told[-1]:
                    await asyncio.sleep(0.05)

                # 3. Its end.
                _, ended = await ask(http, "DELETE", f"{url}/0", at.admin_key)
                assert ended["counts"]["turns"] == 2
                assert (await ask(http, "POST", opened["base_url"] + "/chat/completions", opened["key"]))[
                    0
                ] == 404
                assert (await ask(http, "POST", url, at.admin_key))[1]["group"] == 1
            async with standalone_gateway(order, told.append) as at, aiohttp.ClientSession() as http:
                url = f"{at.url}/admin/sessions"
                assert (await ask(http, "POST", url, at.admin_key))[1]["group"] == 2, "it goes on"

    asyncio.run(test())
    state = read_state(tmp_path / "to/rollouts/journal")
    response = state.open[0].responses[0]
    assert [each.task for each in state.open.values()] == ["mine", "session", "session"]
    assert (response.num_turns, len(response.branches), set(response.versions)) == (2, 1, {7})
    assert all(each.responses[0].is_finished for each in state.open.values())
    tokenizer = str(tmp_path / "tokenizer.json")
    assert main(["show", str(tmp_path / "to"), "mine", "--tokenizer", tokenizer]) == 0
    shown = capsys.readouterr().out
    assert "Hello" in shown and "More" in shown and "2 turns" in shown
    assert (tmp_path / "to/config.yaml").read_text() == "saved: true\n"


def test_without_an_engine_it_says_what_to_do(tmp_path: Path) -> None:
    async def test() -> None:
        async with standalone_gateway(order_of(tmp_path, []), print):
            pass

    with pytest.raises(ConfigError, match="--url"):
        asyncio.run(test())


def test_engines_of_other_weights_get_nothing() -> None:
    assert reasons({"a": 3, "b": 4, "c": "gone"}, None) == (
        {"a": "its weights are of version 3, where version 4 is served", "c": "gone"},
        4,
    )
    assert reasons({"a": 3, "b": 4}, 3)[0].keys() == {"b"}
    assert reasons({"a": "gone"}, None) == ({"a": "gone"}, None)
    assert reasons({"a": "gone"}, 3)[1] == 3
