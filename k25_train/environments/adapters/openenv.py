"""OpenEnv's servers: one web socket is one attempt, its actions are one tool.

    WS /ws: reset{seed, …} ─► observation; step{…} ─► {observation, reward, done}; close

    family: openenv    options: {url: 'http://host:8000', prompt: …}

A turn without calls ends the attempt, unless `content` names the field of the action that it fills, as for
servers that are talked to. Source: openenv 0.10, `core/env_server/http_server.py` and `core/env_client.py`.
"""

import asyncio
import hashlib
import json
import time
from collections.abc import Mapping
from typing import Any

import aiohttp

from k25_train.environments.adapters.messages import (
    as_text,
    content_of,
    is_reward,
    refusal,
    result,
    tool,
    verdict_of,
    with_images,
)
from k25_train.environments.adapters.server import FIRST_WAIT_S, LONGEST_WAIT_S, EnvironmentServer
from k25_train.environments.adapters.sources import (
    need,
    one_of,
    read_seconds,
    read_text,
    read_urls,
    reward_rule,
    seeded_task,
)
from k25_train.environments.base import Response, Task, Verdict
from k25_train.environments.environment import Action, Observation, Services, Tool, ToolCall
from k25_train.environments.family import Options, Split, read_range

NAME = "openenv"
STEP = "step"
"""The one tool."""
OF_POLICY = frozenset({"VALIDATION_ERROR", "EXECUTION_ERROR"})
"""Errors of a step that an action may be the cause of: the policy is told, and goes on."""


class OpenEnvTasks:
    """Every seed of a server's environment is a task."""

    name = NAME

    def __init__(self, options: Mapping[str, str]) -> None:
        """Options: `url` (required; several by commas share the attempts), `prompt`, `content` (field of the
        action that a turn without calls fills), `reward` (sum | last), `replayable` (true | false: whether
        the same seed and actions give the same observations), `max_turns`, `patience_s` (how long a server
        that is down or full is asked again). Raises ConfigError."""
        need(NAME, options, "url", "http://127.0.0.1:8000")
        given = Options(NAME, options)
        rule = "must be http://HOST:PORT, or several by commas"
        urls = given.take("url", "http://127.0.0.1:8000", read_urls, rule)
        self._prompt = given.take("prompt", "Reach the goal. Each turn, call step.", read_text, "is empty")
        self._setup = {
            "urls": list(urls),
            "content": given.take("content", "", str, "must be a text"),
            "reward": reward_rule(given),
            "replayable": given.take("replayable", "false", one_of("true", "false"), "must be true or false"),
            "patience_s": given.take("patience_s", "120", read_seconds, "must be seconds above 0"),
        }
        self._max_turns = given.take("max_turns", "100", read_range, "must be 1 or more")[-1]
        given.end()

    def task(self, split: Split, number: int) -> Task:
        """The task of a seed."""
        return seeded_task(
            NAME, NAME, split, number, prompt=self._prompt, setup=self._setup, max_turns=self._max_turns
        )


class OpenEnvEnvironment:
    """See `Environment`."""

    def __init__(self, task: Task, services: Services) -> None:
        self._task, self._setup = task, task.setup
        urls = self._setup["urls"]
        self._server = EnvironmentServer(
            "OpenEnv",
            urls[int.from_bytes(hashlib.sha256(task.key.encode()).digest()[:4]) % len(urls)],
            timeout_s=services.tool_timeout_s,
            patience_s=self._setup["patience_s"],
        )
        self._socket: aiohttp.ClientWebSocketResponse | None = None
        self._rewards: list[float] = []
        self._is_over = False
        self.is_replayable = self._setup["replayable"] == "true"
        self.tools: tuple[Tool, ...] = ()

    async def reset(self) -> Observation:
        """The prompt, with what is seen at first."""
        # 1. What it is, and what can be done there.
        health = await self._server.get("/health")
        if not isinstance(health, Mapping) or health.get("status") != "healthy":
            raise self._server.form("GET /health", "has no status: healthy", health)
        schema = await self._server.get("/schema")
        action = schema.get("action") if isinstance(schema, Mapping) else None
        if not isinstance(action, Mapping) or not isinstance(action.get("properties"), Mapping):
            raise self._server.form("GET /schema", "has no JSON schema of actions", schema)
        self.tools = (tool(STEP, _description(action), _parameters(action)),)

        # 2. An environment of its own.
        data = await self._begin()
        text, images = self._seen("reset", data)
        (first, *others) = self._task.messages
        content = content_of(f"{first['content']}\n\n{text}", images)
        return Observation(messages=({**first, "content": content}, *others), media=images)

    async def step(self, action: Action) -> Observation:
        """What comes of its calls, one after another; a turn without any is the last, or an action."""
        told = refusal(action, [STEP])
        if told is not None:
            return told
        if not action.calls:
            field = self._setup["content"]
            if not field:
                return Observation(done=True)
            text, images = await self._step({field: action.content})
            if self._is_over:
                return Observation(done=True)
            return Observation(
                messages=({"role": "user", "content": content_of(text, images)},), media=images
            )
        messages: list[Mapping[str, Any]] = []
        media: tuple[bytes, ...] = ()
        for call in action.calls:
            message, images = await self._called(call)
            messages.append(message)
            media += images
        return Observation(messages=tuple(messages), media=media, done=self._is_over)

    async def judge(self, response: Response) -> Verdict:
        """What its rewards amount to."""
        return verdict_of(self._rewards, self._setup["reward"])

    async def close(self) -> None:
        """Give its place on the server back."""
        socket, self._socket = self._socket, None
        try:
            if socket is not None and not socket.closed:
                await socket.send_str(json.dumps({"type": "close"}))
                await socket.close()
        except (aiohttp.ClientError, ConnectionError):
            # It is closed either way; the server gives the place back by itself.
            pass
        finally:
            await self._server.close()

    async def _begin(self) -> Mapping[str, Any]:
        """A reset environment; waits while the server has none left."""
        ends, wait_s = time.monotonic() + self._setup["patience_s"], FIRST_WAIT_S
        while True:
            self._socket = await self._server.open_socket("/ws")
            message = {"type": "reset", "data": {"seed": self._setup["seed"], "episode_id": self._task.key}}
            answer = await self._server.exchange(self._socket, "reset", message)
            code = _code(answer)
            if code == "CAPACITY_REACHED" and time.monotonic() + wait_s < ends:
                await self._socket.close()
                await asyncio.sleep(wait_s)
                wait_s = min(2 * wait_s, LONGEST_WAIT_S)
                continue
            if code == "CAPACITY_REACHED":
                patience = self._setup["patience_s"]
                raise self._server.fault(
                    "reset",
                    f"CAPACITY_REACHED for {patience:g} s: {_message(answer)}",
                    "start it with a larger max_concurrent_envs, name more servers in options.url, or lower "
                    "the source's weight",
                )
            if code:
                raise self._server.fault("reset", f"{code}: {_message(answer)}", "its log says more")
            return self._observed("reset", answer)

    async def _called(self, call: ToolCall) -> tuple[Mapping[str, Any], tuple[bytes, ...]]:
        if self._is_over:
            return result(call, "not done: it is over"), ()
        text, images = await self._step(call.arguments)
        return {**result(call, ""), "content": content_of(text, images)}, images

    async def _step(self, action: Mapping[str, Any]) -> tuple[str, tuple[bytes, ...]]:
        assert self._socket is not None, "it was reset"
        answer = await self._server.exchange(self._socket, STEP, {"type": "step", "data": dict(action)})
        code = _code(answer)
        if code in OF_POLICY:
            return f"{code}: {_message(answer)}", ()
        if code:
            raise self._server.fault(STEP, f"{code}: {_message(answer)}", "its log says more")
        data = self._observed(STEP, answer)
        reward = data.get("reward")
        if reward is not None:
            if not is_reward(reward):
                raise self._server.form(STEP, "has a reward that is no finite number", data)
            self._rewards.append(float(reward))
        self._is_over = data["done"]
        text, images = self._seen(STEP, data)
        lines = [text, *([f"Reward: {reward:g}."] if reward is not None else [])]
        return "\n".join([*lines, *(["It is over."] if self._is_over else [])]), images

    def _observed(self, asked: str, answer: Any) -> Mapping[str, Any]:
        data = answer.get("data") if isinstance(answer, Mapping) else None
        if not isinstance(data, Mapping) or answer.get("type") != "observation" or "observation" not in data:
            raise self._server.form(asked, "is no observation", answer)
        if not isinstance(data.get("done"), bool):
            raise self._server.form(asked, "does not say whether it is done", answer)
        return data

    def _seen(self, asked: str, data: Mapping[str, Any]) -> tuple[str, tuple[bytes, ...]]:
        """An observation as text and images; metadata are not the policy's."""
        seen = data["observation"]
        if isinstance(seen, Mapping):
            seen = {name: value for name, value in seen.items() if name not in ("metadata", "reward", "done")}
        rest, images = with_images(seen)
        return as_text(rest), images


def _parameters(schema: Mapping[str, Any]) -> dict[str, Any]:
    """An action's schema as a tool has it: without metadata and titles of pydantic."""
    properties = {name: value for name, value in schema["properties"].items() if name != "metadata"}
    kept = {name: schema[name] for name in ("$defs", "additionalProperties") if name in schema}
    required = [name for name in schema.get("required", ()) if name in properties]
    return {"type": "object", "properties": properties, "required": required, **kept}


def _description(schema: Mapping[str, Any]) -> str:
    said = str(schema.get("description", "")).strip().split("\n\n")[0]
    return f"Does one action; answers with what is seen then. {said}".strip()


def _code(answer: Any) -> str:
    """Code of an error; empty for none."""
    if not isinstance(answer, Mapping) or answer.get("type") != "error":
        return ""
    data = answer.get("data")
    return str(data.get("code") or "no code") if isinstance(data, Mapping) else "no code"


def _message(answer: Mapping[str, Any]) -> str:
    data = answer.get("data")
    if not isinstance(data, Mapping):
        return ""
    errors = data.get("errors")
    details = "; ".join(
        f"{'.'.join(map(str, each.get('loc', ())))}: {each.get('msg', '')}"
        for each in errors or ()
        if isinstance(each, Mapping)
    )
    return f"{data.get('message', '')} {details}".strip()
