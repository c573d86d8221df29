"""Our environments behind OpenEnv's wire, for trainers that speak it.

    GET /health /schema /metadata    POST /reset /step, GET /state: by episode_id    WS /ws: one attempt

`reset{seed, split}` is task `seed` of the split. An action is a turn of the policy: `content`, `reasoning`,
`calls`. What is seen are messages, images as data URIs, and tools; the verdict's reward comes with `done`. A
verdict that there is not is an error, never 0. Source: openenv 0.10, `core/env_server/http_server.py`.
"""

import asyncio
import json
import time
import uuid
from collections.abc import Callable, Mapping
from typing import Any

from aiohttp import WSMsgType, web

from k25_train.environments.adapters.served_attempt import (
    ACTION,
    OBSERVATION,
    STATE,
    Attempt,
    WrongActionError,
)
from k25_train.environments.adapters.server import MAX_MESSAGE_BYTES
from k25_train.environments.base import Task
from k25_train.environments.environment import Environment
from k25_train.environments.family import Split
from k25_train.errors import K25Error


class OpenEnvServer:
    """Serves attempts at the tasks of one source."""

    def __init__(
        self,
        name: str,
        task: Callable[[Split, int], Task],
        make: Callable[[Task], Environment],
        *,
        most: int,
        idle_s: float,
    ) -> None:
        """
        Args:
            name: of the source, for people.
            task: makes its tasks.
            make: makes what one attempt acts in.
            most: attempts at once; further ones are told CAPACITY_REACHED.
            idle_s: seconds after which an attempt over HTTP that nobody steps is closed.
        """
        self._name, self._task, self._make = name, task, make
        self._most, self._idle_s = most, idle_s
        self._attempts: dict[str, Attempt] = {}
        self._used: dict[str, float] = {}

    def app(self) -> web.Application:
        """What an HTTP server runs."""
        app = web.Application(client_max_size=MAX_MESSAGE_BYTES)
        app.router.add_get("/health", self._health)
        app.router.add_get("/schema", self._schema)
        app.router.add_get("/metadata", self._metadata)
        app.router.add_get("/state", self._state)
        app.router.add_post("/reset", self._reset)
        app.router.add_post("/step", self._step)
        app.router.add_get("/ws", self._socket)
        app.on_shutdown.append(self._close)
        return app

    async def _close(self, _: web.Application) -> None:
        for attempt in list(self._attempts.values()):
            await attempt.close()
        self._attempts.clear()

    async def _health(self, _: web.Request) -> web.Response:
        return web.json_response({"status": "healthy"})

    async def _schema(self, _: web.Request) -> web.Response:
        return web.json_response({"action": ACTION, "observation": OBSERVATION, "state": STATE})

    async def _metadata(self, _: web.Request) -> web.Response:
        return web.json_response({"name": self._name, "description": f"k25-train's tasks of {self._name}"})

    async def _state(self, request: web.Request) -> web.Response:
        return web.json_response(self._found(request.query.get("episode_id")).state())

    async def _reset(self, request: web.Request) -> web.Response:
        body = await _body(request)
        await self._sweep()
        key, attempt = self._opened(str(body.get("episode_id") or uuid.uuid4().hex))
        try:
            seen = await attempt.reset(body)
        except BaseException as error:
            await self._closed(key)
            if isinstance(error, K25Error | ValueError):
                raise _refused(422 if isinstance(error, ValueError) else 503, str(error)) from error
            raise
        return web.json_response({**seen, "metadata": {"episode_id": key}})

    async def _step(self, request: web.Request) -> web.Response:
        body = await _body(request)
        key = body.get("episode_id")
        attempt = self._found(key)
        self._used[str(key)] = time.monotonic()
        try:
            seen = await attempt.step(body.get("action"))
        except WrongActionError as error:
            raise _refused(422, str(error)) from error
        except K25Error as error:
            await self._closed(str(key))
            raise _refused(503, str(error)) from error
        if seen["done"]:
            await self._closed(str(key))
        return web.json_response(seen)

    async def _socket(self, request: web.Request) -> web.WebSocketResponse:
        socket = web.WebSocketResponse(max_msg_size=MAX_MESSAGE_BYTES, heartbeat=30)
        await socket.prepare(request)
        if len(self._attempts) >= self._most:
            data = {"active_sessions": len(self._attempts), "max_sessions": self._most}
            text = f"all {self._most} attempts are in use"
            await socket.send_json(_error("CAPACITY_REACHED", text, **data))
            await socket.close()
            return socket
        key, attempt = self._opened(uuid.uuid4().hex)
        try:
            async for message in socket:
                if message.type is not WSMsgType.TEXT:
                    break
                answer = await _answered(attempt, message.data)
                if answer is None:
                    break
                await socket.send_json(answer)
        finally:
            await asyncio.shield(self._closed(key))
        return socket

    def _opened(self, key: str) -> tuple[str, Attempt]:
        """A new attempt. Raises 503 where there are as many as there may be, 409 for a name that is taken."""
        if key in self._attempts:
            raise _refused(409, f"episode_id={key} is in use: choose another, or leave it out")
        if len(self._attempts) >= self._most:
            raise _refused(503, f"CAPACITY_REACHED: all {self._most} attempts are in use; ask again later")
        self._attempts[key] = Attempt(self._task, self._make)
        self._used[key] = time.monotonic()
        return key, self._attempts[key]

    async def _closed(self, key: str) -> None:
        attempt = self._attempts.pop(key, None)
        self._used.pop(key, None)
        if attempt is not None:
            await attempt.close()

    async def _sweep(self) -> None:
        """Close attempts over HTTP that nobody steps any more."""
        now = time.monotonic()
        for key in [key for key, used in self._used.items() if now - used > self._idle_s]:
            await self._closed(key)

    def _found(self, key: object) -> Attempt:
        attempt = self._attempts.get(str(key))
        if attempt is None:
            raise _refused(
                404, f"episode_id={key}: no such attempt. /reset answers with its name; or use the web socket"
            )
        return attempt


async def _answered(attempt: Attempt, text: str) -> dict[str, Any] | None:
    """The answer to a message; None for one that closes."""
    try:
        message = json.loads(text)
        kind, data = message["type"], message.get("data", {})
    except (ValueError, TypeError, KeyError, AttributeError, RecursionError) as error:
        return _error("INVALID_JSON", f"Invalid JSON: {error}")
    try:
        match kind:
            case "close":
                return None
            case "reset":
                return {"type": "observation", "data": await attempt.reset(data)}
            case "step":
                return {"type": "observation", "data": await attempt.step(data)}
            case "state":
                return {"type": "state", "data": attempt.state()}
        return _error("UNKNOWN_TYPE", f"Unknown message type: {kind}")
    except (WrongActionError, ValueError) as error:
        return _error("VALIDATION_ERROR", str(error))
    except K25Error as error:
        return _error("SESSION_ERROR", str(error))
    except Exception as error:
        # An environment's code may raise anything: whoever asked has to be told.
        return _error("SESSION_ERROR", f"{type(error).__name__}: {error}")


def _error(code: str, message: str, **more: Any) -> dict[str, Any]:
    return {"type": "error", "data": {"message": message, "code": code, **more}}


async def _body(request: web.Request) -> Mapping[str, Any]:
    try:
        body = await request.json()
    except ValueError as error:
        raise _refused(422, f"the body is no JSON: {error}") from error
    if type(body) is not dict:
        raise _refused(422, "the body is no JSON object")
    return dict(body)


def _refused(status: int, text: str) -> web.HTTPException:
    kinds = {404: web.HTTPNotFound, 409: web.HTTPConflict, 422: web.HTTPUnprocessableEntity}
    return kinds.get(status, web.HTTPServiceUnavailable)(
        text=json.dumps({"detail": text}), content_type="application/json"
    )
