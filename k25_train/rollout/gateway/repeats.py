"""Requests that come twice are answered once.

    a retry (x-stainless-retry-count >= 1, the same Idempotency-Key)     the answer there is, or will be
    a first try (x-stainless-retry-count: 0)                             a turn of its own, unless nobody has
                                                                         got the other's answer
    neither is said                                                      as a retry

Who hangs up may try again: generation goes on for `RETRY_S`, and ends if nobody asks for it by then.
"""

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass
from enum import Enum
from typing import Any

from k25_train.rollout.gateway.conversation import Answer

RETRY_S = 10.0
"""Seconds that generation goes on without anybody who waits for it; SDKs try again within 8."""
KEPT = 64
"""Answers of a session that are kept for retries; they come soon or never."""


class Attempt(Enum):
    """What a request says of itself."""

    first = "first"
    again = "again"
    unsaid = "unsaid"


@dataclass(slots=True)
class Entry:
    """A request, and its answer."""

    work: asyncio.Task[Answer]
    waiting: int = 0
    """Clients that wait for it."""
    is_delivered: bool = False
    """Whether one has got it."""
    is_given_up: bool = False
    """Whether it was cancelled, since nobody waited."""

    @property
    def failed(self) -> bool:
        """Whether there is no answer, and will be none."""
        if self.is_given_up:
            return True
        return self.work.done() and (self.work.cancelled() or self.work.exception() is not None)


def is_repeat(attempt: Attempt, entry: Entry | None) -> bool:
    """Whether a request gets the answer of an earlier one with the same digest."""
    if entry is None or entry.failed:
        return False
    return attempt is not Attempt.first or not (entry.waiting or entry.is_delivered)


class Repeats:
    """Requests of one session by digest."""

    def __init__(self) -> None:
        self._entries: dict[str, Entry] = {}
        self.num_repeated = 0
        """Requests that were answered by an earlier one's answer."""

    @asynccontextmanager
    async def answering(
        self, digest: str, attempt: Attempt, make: Callable[[], Awaitable[Answer]]
    ) -> AsyncIterator[asyncio.Task[Answer]]:
        """The work whose answer this request gets; the block delivers it, or raises."""
        entry = self._entries.get(digest)
        if entry is None or not is_repeat(attempt, entry):
            entry = Entry(asyncio.ensure_future(_started(make)))
            self._keep(digest, entry)
        else:
            self.num_repeated += 1
        entry.waiting += 1
        try:
            yield entry.work
            entry.is_delivered = True
        finally:
            entry.waiting -= 1
            if not entry.waiting and not entry.work.done():
                asyncio.get_running_loop().call_later(RETRY_S, _give_up, entry)

    async def close(self) -> None:
        """Cancel what is in flight, and wait for it."""
        found = [entry.work for entry in self._entries.values() if not entry.work.done()]
        for work in found:
            work.cancel()
        await asyncio.gather(*found, return_exceptions=True)
        self._entries.clear()

    def _keep(self, digest: str, entry: Entry) -> None:
        self._entries.pop(digest, None)
        self._entries[digest] = entry
        for old in [key for key, each in self._entries.items() if each.work.done()][:-KEPT]:
            del self._entries[old]


async def _started(make: Callable[[], Awaitable[Answer]]) -> Answer:
    return await make()


def _give_up(entry: Entry) -> None:
    if not entry.waiting and not entry.work.done():
        entry.is_given_up = True
        entry.work.cancel()


def attempt_of(headers: Any) -> Attempt:
    """What a request's headers say of it."""
    if headers.get("idempotency-key"):
        return Attempt.again
    count = headers.get("x-stainless-retry-count")
    if count is None:
        return Attempt.unsaid
    return Attempt.first if count.strip() == "0" else Attempt.again
