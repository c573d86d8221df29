"""The gateway: an HTTP server that agents take for OpenAI's or Anthropic's.

    agent ── POST [/sessions/ID]/v1/chat/completions | responses | messages ──► session ──► policy
             Authorization: Bearer KEY | x-api-key: KEY

An answer is generated whole before its first byte, since a turn is on record before anybody hears of it. In
streams, keep-alives go out meanwhile, once it has taken `KEEP_ALIVE_S`; until then errors have their status.
"""

import asyncio
import hashlib
import json
import logging
from collections.abc import Awaitable, Callable, Mapping, Sequence
from typing import Any

from aiohttp import web

from k25_train.errors import RolloutError
from k25_train.rollout.gateway.commands import MODEL
from k25_train.rollout.gateway.conversation import Answer, Asked, Kind, RefusedError
from k25_train.rollout.gateway.dialects.table import CHAT, DIALECTS, Dialect
from k25_train.rollout.gateway.registry import Registry
from k25_train.rollout.gateway.repeats import attempt_of
from k25_train.rollout.gateway.sessions import AgentSession

LARGEST_BODY = 64 * 2**20
"""Bytes of a request, with its images."""
LONG_BODY = 2**18
"""Bytes from which on JSON is read in a thread: about 2 ms."""
KEEP_ALIVE_S = 5.0
"""Seconds between keep-alives of a stream; proxies and SDKs wait for a minute and longer."""
SHUTDOWN_S = 1.0
"""Seconds that requests have to end when the server does."""
BACKLOG = 4_096
"""Connections that wait to be accepted."""
IGNORED = "x-k25-ignored"
"""Header of answers that names keys of the request without effect."""
LOG = logging.getLogger(__name__)

Handler = Callable[[web.Request], Awaitable[web.StreamResponse]]


class Gateway:
    """Routes of the sessions that are open."""

    def __init__(self, registry: Registry, more: Callable[[], Mapping[str, Any]] = dict) -> None:
        """`more`: what `/health` tells beside the number of sessions."""
        self._registry, self._more = registry, more

    def app(self) -> web.Application:
        """The application."""
        app = web.Application(client_max_size=LARGEST_BODY, middlewares=[_errors])
        for prefix in ("", "/sessions/{session_id}"):
            for dialect in DIALECTS:
                app.router.add_post(prefix + dialect.path, self._handler(dialect))
            app.router.add_get(f"{prefix}/v1/models", self._models)
        app.router.add_get("/health", self._health)
        return app

    def _handler(self, dialect: Dialect) -> Handler:
        async def handle(http: web.Request) -> web.StreamResponse:
            try:
                session = self._registry.find(http.match_info.get("session_id"), http.headers)
                raw, body = await _read(http)
                asked = dialect.parse(body)
                return await _answered(http, dialect, session, asked, raw)
            except RefusedError as error:
                return _refused(dialect, error)
            except (ConnectionError, asyncio.CancelledError):
                raise
            except Exception as error:
                # Keys are in no message: headers are not told.
                LOG.exception("gateway: %s failed", dialect.path)
                failed = RefusedError(Kind.failed, f"the gateway failed: {type(error).__name__}: {error}")
                return _refused(dialect, failed)

        return handle

    async def _models(self, http: web.Request) -> web.Response:
        try:
            self._registry.find(http.match_info.get("session_id"), http.headers)
        except RefusedError as error:
            return _refused(CHAT, error)
        model = {"id": MODEL, "object": "model", "type": "model", "created": 0, "owned_by": "k25-train"}
        listed = {"object": "list", "has_more": False, "first_id": MODEL, "last_id": MODEL}
        shown = {"display_name": MODEL, "created_at": "1970-01-01T00:00:00Z"}
        return web.json_response({**listed, "data": [{**model, **shown}]})

    async def _health(self, _: web.Request) -> web.Response:
        return web.json_response({"sessions": len(self._registry), **self._more()})


async def _read(http: web.Request) -> tuple[bytes, dict[str, Any]]:
    """A request's body. Raises `RefusedError` if it is too long, or no JSON object."""
    try:
        raw = await http.read()
    except web.HTTPRequestEntityTooLarge as error:
        raise RefusedError(
            Kind.too_large, f"the body is longer than {LARGEST_BODY:,} bytes: send smaller images"
        ) from error
    try:
        body = json.loads(raw) if len(raw) < LONG_BODY else await asyncio.to_thread(json.loads, raw)
    except (ValueError, RecursionError) as error:
        raise RefusedError(Kind.invalid, f"the body is no JSON: {error}", code="invalid_json") from error
    if not isinstance(body, dict):
        raise RefusedError(Kind.invalid, "the body is JSON, but no object", code="invalid_json")
    return raw, body


async def _answered(
    http: web.Request, dialect: Dialect, session: AgentSession, asked: Asked, raw: bytes
) -> web.StreamResponse:
    """Answer a request; raises `RefusedError` while nothing has been sent."""
    digest = hashlib.blake2b(raw, digest_size=16)
    digest.update(f"{dialect.path} {http.headers.get('idempotency-key', '')}".encode())
    attempt = attempt_of(http.headers)
    headers = {IGNORED: ", ".join(asked.ignored)} if asked.ignored else {}
    repeats = session.repeats
    async with repeats.answering(digest.hexdigest(), attempt, lambda: session.answer(asked)) as work:
        if asked.stream:
            return await _streamed(http, dialect, asked, work, headers)
        answer = await asyncio.shield(work)
        response = web.json_response(dialect.answer_json(asked, answer), headers=headers)
        # Sent within the block: who has hung up has not got it.
        await response.prepare(http)
        await response.write_eof()
        return response


async def _streamed(
    http: web.Request, dialect: Dialect, asked: Asked, work: "asyncio.Task[Answer]", headers: dict[str, str]
) -> web.StreamResponse:
    """Answer with events, behind keep-alives."""
    kept = {**headers, "content-type": "text/event-stream; charset=utf-8", "cache-control": "no-cache"}
    response = web.StreamResponse(headers=kept)
    while not work.done():
        await asyncio.wait([work], timeout=KEEP_ALIVE_S)
        if not work.done():
            if not response.prepared:
                await response.prepare(http)
            await response.write(dialect.keep_alive)
    try:
        answer = work.result()
    except RefusedError as error:
        if not response.prepared:
            raise
        await response.write(dialect.error_event(error).encode())
    else:
        if not response.prepared:
            await response.prepare(http)
        await response.write(b"".join(event.encode() for event in dialect.events(asked, answer)))
    await response.write_eof()
    return response


def _refused(dialect: Dialect, error: RefusedError) -> web.Response:
    headers = {"x-should-retry": "true" if error.kind.is_temporary else "false"}
    return web.json_response(dialect.error_json(error), status=error.kind.status, headers=headers)


@web.middleware
async def _errors(request: web.Request, handler: Handler) -> web.StreamResponse:
    """A path that is not known gets an error that clients can read."""
    try:
        return await handler(request)
    except web.HTTPException as error:
        if error.status not in (404, 405):
            raise
        known = ", ".join(dialect.path for dialect in DIALECTS)
        told = RefusedError(Kind.unknown, f"{request.method} {request.path} is not served; POST to {known}")
        return web.json_response(CHAT.error_json(told), status=error.status)


async def run_gateway(registry: Registry, host: str, ports: Sequence[int]) -> tuple[web.AppRunner, str]:
    """Start serving; the runner, whose `cleanup` ends it, and the base URL.

    `ports`: of which the first free one is taken; 0 for any. Raises `RolloutError` if there is none.
    """
    return await serve_app(Gateway(registry).app(), host, ports)


async def serve_app(app: web.Application, host: str, ports: Sequence[int]) -> tuple[web.AppRunner, str]:
    """Start serving an application. As `run_gateway`."""
    runner = web.AppRunner(app, handler_cancellation=True, access_log=None, shutdown_timeout=SHUTDOWN_S)
    await runner.setup()
    problem: OSError | None = None
    for port in ports:
        try:
            await web.TCPSite(runner, host, port, backlog=BACKLOG).start()
        except OSError as error:
            problem = error
        else:
            return runner, f"http://{host}:{runner.addresses[0][1]}"
    await runner.cleanup()
    raise RolloutError(
        f"the gateway cannot listen on {host}, ports {ports[0]} to {ports[-1]}: {problem}. Give "
        "rollout.manager.gateway_port other ones, or 0 for free ones"
    )
