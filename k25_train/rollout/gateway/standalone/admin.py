"""Who may open sessions at a standalone gateway: whoever has the key that it prints once.

POST   /admin/sessions          {"name": "task 7", "thinking": false, "max_turns": 100, "strict": false}
                                ─► {"session": …, "key": …, "base_url": …, "group": …}; the key is told once
GET    /admin/sessions          ─► what is open, without keys
DELETE /admin/sessions/GROUP    ends one; what is in flight is cancelled
"""

import hmac
import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from aiohttp import web

from k25_train.rollout.gateway.conversation import Kind, RefusedError
from k25_train.rollout.gateway.dialects.table import CHAT
from k25_train.rollout.gateway.registry import Access, Registry, key_of
from k25_train.rollout.gateway.sessions import AgentSession, SessionRules
from k25_train.rollout.gateway.standalone.health import Health
from k25_train.rollout.gateway.standalone.traces import Traces

KEYS: Mapping[str, type] = {"name": str, "thinking": bool, "max_turns": int, "strict": bool}
"""Of a body, and their types."""
MOST_OPEN = 2**16
"""Sessions at once. Our choice."""


@dataclass(frozen=True, slots=True)
class _Open:
    name: str
    access: Access
    session: AgentSession


class Admin:
    """Opens and ends sessions."""

    def __init__(
        self, registry: Registry, traces: Traces, health: Health, key: str, *, max_turns: int
    ) -> None:
        """`key`: what callers have to have; `max_turns`: of a session that does not say."""
        self._registry, self._traces, self._health, self._key = registry, traces, health, key
        self._max_turns = max_turns
        self._open: dict[int, _Open] = {}

    def add_to(self, app: web.Application) -> None:
        """Add the routes."""
        app.router.add_post("/admin/sessions", self._post)
        app.router.add_get("/admin/sessions", self._get)
        app.router.add_delete("/admin/sessions/{group:[0-9]{1,12}}", self._delete)

    async def close(self) -> None:
        """End all sessions."""
        for number in list(self._open):
            await self._end(number)

    async def _post(self, http: web.Request) -> web.Response:
        try:
            self._check_key(http)
            body = await _body(http)
            version = self._version()
        except RefusedError as error:
            return _refused(error)
        rules = SessionRules(
            thinking=body.get("thinking", False),
            max_turns=body.get("max_turns", self._max_turns),
            strict=body.get("strict", False),
        )
        name = body.get("name", "session")
        number, session = self._traces.begin(name, version, rules)
        access = self._registry.admit(session)
        self._open[number] = _Open(name, access, session)
        base = f"{http.scheme}://{http.host}/sessions/{access.session_id}/v1"
        told = {"session": access.session_id, "key": access.key, "base_url": base, "group": number}
        return web.json_response(told, status=201)

    async def _get(self, http: web.Request) -> web.Response:
        try:
            self._check_key(http)
        except RefusedError as error:
            return _refused(error)
        found = [
            {"group": number, "name": each.name, "counts": dict(each.session.counts)}
            for number, each in self._open.items()
        ]
        return web.json_response({"sessions": found})

    async def _delete(self, http: web.Request) -> web.Response:
        number = int(http.match_info["group"])
        try:
            self._check_key(http)
            self._check_open(number)
        except RefusedError as error:
            return _refused(error)
        counts = dict(self._open[number].session.counts)
        await self._end(number)
        return web.json_response({"group": number, "counts": counts})

    async def _end(self, number: int) -> None:
        # Out of the table first: whoever asks meanwhile is told that there is none.
        access = self._open.pop(number).access
        await self._registry.close(access)
        self._traces.end(number)

    def _version(self) -> int:
        """Of the weights, for another session. Raises `RefusedError` where there can be none."""
        if len(self._open) >= MOST_OPEN:
            raise RefusedError(Kind.too_many, f"{MOST_OPEN:,} sessions are open: end some (DELETE)")
        if self._health.version is None:
            raise RefusedError(Kind.no_engine, "no engine has answered yet: GET /health says why")
        return self._health.version

    def _check_open(self, number: int) -> None:
        if number not in self._open:
            raise RefusedError(Kind.unknown, f"no session of group {number} is open")

    def _check_key(self, http: web.Request) -> None:
        given = key_of(http.headers).encode("utf-8", "surrogatepass")
        if not hmac.compare_digest(given, self._key.encode()):
            raise RefusedError(Kind.unauthorized, "this needs the key that the gateway has printed")


async def _body(http: web.Request) -> dict[str, Any]:
    """What a session is to be like. Raises `RefusedError` for anything else."""
    try:
        body = json.loads(await http.read() or b"{}")
    except (ValueError, RecursionError) as error:
        raise RefusedError(Kind.invalid, f"the body is no JSON: {error}") from error
    if not isinstance(body, dict):
        raise RefusedError(Kind.invalid, "the body is JSON, but no object")
    for key, value in body.items():
        is_too_few = key == "max_turns" and isinstance(value, int) and value < 1
        if key not in KEYS or type(value) is not KEYS[key] or value == "" or is_too_few:
            known = ", ".join(f"{name}: {kind.__name__}" for name, kind in KEYS.items())
            raise RefusedError(Kind.invalid, f"{key}={value!r}: a body has {known}", key=key)
    return body


def _refused(error: RefusedError) -> web.Response:
    return web.json_response(CHAT.error_json(error), status=error.kind.status)
