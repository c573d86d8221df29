"""JSON over HTTP to one engine: one pooled session, bounded retries, a time limit on everything.

The pool itself has no limit: who generates waits at the engine's own count of requests (`http_engine.py`),
so that a pause or an update never queues behind thousands of responses.
"""

import asyncio
import json
from collections.abc import Callable, Mapping
from typing import Any

import aiohttp

from k25_train.rollout.engines.faults import FaultKind, FaultLog

CONNECT_S = 30.0
"""Seconds in which a host has to take a connection."""
RETRIED = frozenset({429, 500, 502, 503, 504})
"""Statuses after which the same request may succeed; what is asked twice does no harm."""
FIRST_WAIT_S = 0.1
"""Seconds before the second try; twice as many before each further one."""


class HttpClient:
    """Sends requests to one base URL."""

    def __init__(self, url: str, faults: FaultLog, *, attempts: int) -> None:
        """To be made where an event loop runs.

        Args:
            url: base URL.
            faults: names the engine.
            attempts: tries of a request, 1 for no retry.
        """
        self.url = url.rstrip("/")
        self.faults = faults
        self._attempts = attempts
        self._session = aiohttp.ClientSession(
            connector=aiohttp.TCPConnector(limit=0, ttl_dns_cache=300),
            timeout=aiohttp.ClientTimeout(total=None, sock_connect=CONNECT_S),
        )

    async def close(self) -> None:
        """Close all connections."""
        await self._session.close()

    async def get(self, path: str, *, seconds: float) -> Any:
        """The JSON of a GET; errors as `post` has them."""
        return self._json(path, await self._limited("GET", path, None, path, seconds))

    async def get_text(self, path: str, *, seconds: float) -> str:
        """The text of a GET; errors as `post` has them."""
        return (await self._limited("GET", path, None, path, seconds)).decode("utf-8", "replace")

    async def post(
        self, path: str, body: Mapping[str, Any] | None = None, *, subject: str = "", seconds: float
    ) -> Any:
        """The JSON answer to a POST; None where it is empty.

        Args:
            path: below the base URL, with its query.
            body: sent as JSON.
            subject: what messages call the request; the path without one.
            seconds: time limit of all tries together.

        Raises `EngineError`: unreachable, another status than 200, too late, or no JSON.
        """
        return self._json(subject or path, await self._limited("POST", path, body, subject or path, seconds))

    async def post_unlimited(self, path: str, body: Mapping[str, Any], *, subject: str) -> Any:
        """As `post`, but the caller has the time limit."""
        return self._json(subject, await self._tried("POST", path, body, subject))

    def parsed[T](self, subject: str, answer: Any, parse: Callable[[Any], T], kind: str, remedy: str) -> T:
        """What `parse` makes of an answer.

        Raises `EngineError` if it raises LookupError, TypeError, ValueError or AttributeError: the answer is
        not of the form of that kind of server.
        """
        try:
            return parse(answer)
        except (LookupError, TypeError, ValueError, AttributeError) as error:
            raise self.faults.error(
                FaultKind.malformed,
                subject,
                f"not of {kind}'s form ({type(error).__name__}: {error}): "
                f"{self.faults.quoted(json.dumps(answer))}",
                remedy,
            ) from error

    def too_late(self, subject: str, seconds: float) -> Exception:
        """The error for a request without an answer."""
        return self.faults.error(
            FaultKind.timeout,
            subject,
            f"no answer within {seconds:g} s",
            "look at its log and load; rollout.request_timeout_s and rollout.update_timeout_s are the limits",
        )

    async def _limited(
        self, method: str, path: str, body: Mapping[str, Any] | None, subject: str, seconds: float
    ) -> bytes:
        try:
            async with asyncio.timeout(seconds):
                return await self._tried(method, path, body, subject)
        except TimeoutError as error:
            raise self.too_late(subject, seconds) from error

    async def _tried(self, method: str, path: str, body: Mapping[str, Any] | None, subject: str) -> bytes:
        wait_s = FIRST_WAIT_S
        for attempt in range(1, self._attempts + 1):
            try:
                status, answer = await self._once(method, path, body)
            except aiohttp.ClientError as error:
                if attempt == self._attempts:
                    raise self._unreachable(subject, error) from error
            else:
                if status == 200:
                    return answer
                if status not in RETRIED or attempt == self._attempts:
                    raise self._refused(subject, status, answer, attempt)
            await asyncio.sleep(wait_s)
            wait_s *= 2
        raise AssertionError("the last attempt returns or raises")

    async def _once(self, method: str, path: str, body: Mapping[str, Any] | None) -> tuple[int, bytes]:
        async with self._session.request(method, self.url + path, json=body) as answer:
            return answer.status, await answer.read()

    def _unreachable(self, subject: str, error: Exception) -> Exception:
        return self.faults.error(
            FaultKind.unreachable,
            subject,
            f"{type(error).__name__}: {error} ({_tries(self._attempts)})",
            "see whether the engine is running, and start it again: `python -m k25_train.rollout serve`",
        )

    def _refused(self, subject: str, status: int, answer: bytes, attempts: int) -> Exception:
        return self.faults.error(
            FaultKind.status,
            subject,
            f"status {status} ({_tries(attempts)}): {self.faults.quoted(answer)}",
            "the engine's log says more; one that was not started by `python -m k25_train.rollout serve` may "
            "lack a route or an option",
        )

    def _json(self, subject: str, answer: bytes) -> Any:
        if not answer.strip():
            return None
        try:
            return json.loads(answer)
        except ValueError as error:
            raise self.faults.error(
                FaultKind.malformed,
                subject,
                f"no JSON ({error}): {self.faults.quoted(answer)}",
                "something between here and the engine cuts or changes its answers",
            ) from error


def _tries(count: int) -> str:
    return f"{count} {'try' if count == 1 else 'tries'}"
