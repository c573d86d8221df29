"""Tries of what may fail for a while: counted by kind, and given up by name after so many in a row."""

import asyncio
from collections.abc import Awaitable, Callable

from k25_train.errors import K25Error, RolloutError
from k25_train.rollout.engines.base import EngineError
from k25_train.rollout.manager.scope import trouble

FIRST_WAIT_S, LONGEST_WAIT_S = 0.05, 5.0
"""Between tries, doubled each time: an engine that starts again gets a little while. Our choice."""
Count = Callable[[str], None]
"""Told the name of what has happened once more."""


class AttemptError(K25Error):
    """A try that came to nothing."""

    def __init__(self, kind: str, why: str) -> None:
        super().__init__(why)
        self.kind = kind
        self.why = why


async def tried[T](
    what: str,
    call: Callable[[], Awaitable[T]],
    *,
    max_attempts: int,
    count: Count,
    is_hopeless: Callable[[], bool],
) -> T:
    """What a call returns once it succeeds.

    Args:
        what: is tried, for messages.
        max_attempts: tries of it.
        count: told `retried/KIND`.
        is_hopeless: whether an engine's error is the end, since there is no other engine.

    Raises `RolloutError` with all reasons after so many tries, `EngineError` where it is hopeless.
    """
    reasons: list[str] = []
    for attempt in range(max_attempts):
        if attempt:
            await asyncio.sleep(min(FIRST_WAIT_S * 2 ** (attempt - 1), LONGEST_WAIT_S))
        try:
            return await call()
        except AttemptError as error:
            kind, why = error.kind, error.why
        except EngineError as error:
            if is_hopeless():
                raise
            kind, why = "engine_error", str(error)
        count(f"retried/{kind}")
        trouble(kind, why)
        reasons.append(f"{kind}: {why}" if not why.startswith(kind) else why)
    raise RolloutError(
        f"{what}: given up after {len(reasons)} tries (rollout.max_attempts): {'; '.join(reasons)}. "
        "Nothing is lost: put right what failed, and start again"
    )
