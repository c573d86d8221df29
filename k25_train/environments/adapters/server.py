"""One attempt's connection to an environment server: JSON over HTTP and a web socket, all of it with limits.

A server that is down, overloaded, slow or speaks another wire is an `EnvironmentFaultError`, which names it,
the request, the rule and the remedy: the attempt starts over, and never scores 0 for it.
"""

import asyncio
import json
import time
from collections.abc import Mapping
from typing import Any

import aiohttp

from k25_train.environments.environment import EnvironmentFaultError

MAX_MESSAGE_BYTES = 100 << 20
"""Longest answer; screenshots are long. Source: OpenEnv's client, `max_message_size_mb`."""
BUSY = frozenset({429, 502, 503, 504})
"""Statuses of a server that may answer the same request later."""
FIRST_WAIT_S, LONGEST_WAIT_S = 0.1, 5.0
"""Seconds between tries: from the first, twice as many each time, up to the second. Our choice."""


class EnvironmentServer:
    """See the head of this file; cookies of the server are kept, by which some know the attempt."""

    def __init__(self, kind: str, url: str, *, timeout_s: float, patience_s: float) -> None:
        """To be made where an event loop runs.

        Args:
            kind: what it is, for messages, such as `OpenEnv`.
            url: base URL.
            timeout_s: of one request.
            patience_s: for how long a server that is down or full is asked again.
        """
        self.kind, self.url = kind, url
        self._timeout_s, self._patience_s = timeout_s, patience_s
        self._session = aiohttp.ClientSession(
            cookie_jar=aiohttp.CookieJar(unsafe=True), timeout=aiohttp.ClientTimeout(total=None)
        )

    async def close(self) -> None:
        """Close its connections."""
        await self._session.close()

    async def get(self, path: str) -> Any:
        """The JSON of a GET. Raises EnvironmentFaultError for another status than 200, too."""
        return self.json(f"GET {path}", self._sound(f"GET {path}", *await self.request("GET", path)))

    async def post(self, path: str, body: Mapping[str, Any], *, again: bool = True) -> Any:
        """The JSON of a POST; as `get`. `again`: see `request`."""
        answer = await self.request("POST", path, body, again=again)
        return self.json(f"POST {path}", self._sound(f"POST {path}", *answer))

    async def request(
        self, method: str, path: str, body: Mapping[str, Any] | None = None, *, again: bool = True
    ) -> tuple[int, bytes]:
        """Status and body of an answer, whatever the status.

        Args:
            method: of HTTP.
            path: below the URL.
            body: sent as JSON.
            again: whether a server that is full may be asked again: only what changes nothing there, or
                begins an attempt.

        Raises EnvironmentFaultError for no answer.
        """
        asked, ends, wait_s = f"{method} {path}", time.monotonic() + self._patience_s, FIRST_WAIT_S
        while True:
            try:
                status, content = await self._once(method, path, body)
                if not (again and status in BUSY and time.monotonic() + wait_s < ends):
                    return status, content
            except TimeoutError as error:
                raise self.too_late(asked) from error
            except aiohttp.ClientConnectorError as error:
                # Nothing was sent: asking again is safe.
                if time.monotonic() + wait_s >= ends:
                    raise self.unreachable(asked, error) from error
            except aiohttp.ClientError as error:
                how = f"the connection broke, or its answer is cut off ({type(error).__name__}: {error})"
                raise self.fault(asked, how, "look at its log; was it restarted?") from error
            await asyncio.sleep(wait_s)
            wait_s = min(2 * wait_s, LONGEST_WAIT_S)

    async def _once(self, method: str, path: str, body: Mapping[str, Any] | None) -> tuple[int, bytes]:
        async with asyncio.timeout(self._timeout_s):
            async with self._session.request(method, self.url + path, json=body) as answer:
                content = b""
                while len(content) <= MAX_MESSAGE_BYTES and not answer.content.at_eof():
                    content += await answer.content.read(MAX_MESSAGE_BYTES + 1 - len(content))
                if len(content) > MAX_MESSAGE_BYTES:
                    raise self.fault(
                        f"{method} {path}", f"more than {MAX_MESSAGE_BYTES:,} bytes", "have it answer less"
                    )
                return answer.status, content

    async def open_socket(self, path: str) -> aiohttp.ClientWebSocketResponse:
        """A web socket. Raises EnvironmentFaultError."""
        ends, wait_s, asked = time.monotonic() + self._patience_s, FIRST_WAIT_S, f"web socket {path}"
        while True:
            try:
                async with asyncio.timeout(self._timeout_s):
                    return await self._session.ws_connect(self.url + path, max_msg_size=MAX_MESSAGE_BYTES)
            except TimeoutError as error:
                raise self.too_late(asked) from error
            except aiohttp.WSServerHandshakeError as error:
                if error.status not in BUSY or time.monotonic() + wait_s >= ends:
                    raise self.fault(
                        asked, f"status {error.status}", f"see whether a {self.kind} server is at this URL"
                    ) from error
            except aiohttp.ClientError as error:
                if time.monotonic() + wait_s >= ends:
                    raise self.unreachable(asked, error) from error
            await asyncio.sleep(wait_s)
            wait_s = min(2 * wait_s, LONGEST_WAIT_S)

    async def exchange(
        self, socket: aiohttp.ClientWebSocketResponse, asked: str, message: Mapping[str, Any]
    ) -> Any:
        """The JSON answer to a message over a web socket. Raises EnvironmentFaultError."""
        try:
            async with asyncio.timeout(self._timeout_s):
                await socket.send_str(json.dumps(message))
                answer = await socket.receive()
        except TimeoutError as error:
            raise self.too_late(asked) from error
        except (aiohttp.ClientError, ConnectionError) as error:
            raise self.fault(asked, f"the connection broke ({error})", "look at its log") from error
        if answer.type is not aiohttp.WSMsgType.TEXT:
            raise self.fault(asked, "it closed the connection", "look at its log; was it restarted?")
        return self.json(asked, answer.data.encode())

    def json(self, asked: str, content: bytes) -> Any:
        """A body as JSON. Raises EnvironmentFaultError."""
        try:
            return json.loads(content)
        except (ValueError, RecursionError) as error:
            raise self.fault(
                asked,
                f"no JSON ({error}): {quoted(content)}",
                "something between here and the server cuts or changes its answers",
            ) from error

    def fault(self, asked: str, what: str, remedy: str) -> EnvironmentFaultError:
        """The error of a request."""
        return EnvironmentFaultError(f"{self.kind} server {self.url}, {asked}: {what}\n  -> {remedy}")

    def form(self, asked: str, rule: str, answer: object) -> EnvironmentFaultError:
        """The error of an answer that is not of this wire's form."""
        return self.fault(
            asked,
            f"the answer {rule}: {quoted(json.dumps(answer, default=str).encode())}",
            f"see whether a {self.kind} server of a version that README.md names is at this URL",
        )

    def too_late(self, asked: str) -> EnvironmentFaultError:
        """The error of a request without an answer."""
        return self.fault(
            asked,
            f"no answer within {self._timeout_s:g} s (rollout.manager.tool_timeout_s)",
            "look at its log and load, or raise the limit",
        )

    def unreachable(self, asked: str, error: Exception) -> EnvironmentFaultError:
        """The error of a server that is not there."""
        return self.fault(
            asked,
            f"unreachable for {self._patience_s:g} s ({type(error).__name__}: {error})",
            "start it, or correct options.url of its source",
        )

    def _sound(self, asked: str, status: int, content: bytes) -> bytes:
        if status != 200:
            raise self.fault(
                asked,
                f"status {status}: {quoted(content)}",
                f"its log says more; a server that is no {self.kind} server, or of another version, may lack "
                "the route",
            )
        return content


def quoted(content: bytes) -> str:
    """The beginning of what a server said, on one line."""
    text = " ".join(content[:800].decode(errors="replace").split())
    return text[:300] + ("…" if len(text) > 300 else "") or "nothing"
